"""Engines for any model and feeder, without a run around them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness import distributed
from harness.config.sections import merge
from harness.engine.build import build_engines
from harness.engine.engines import Engines
from harness.engine.full_tensors import full_tensors
from harness.task import Task
from tests.support.helpers import tiny_config

Feeder = Callable[[Any, Any], Any]
SGD = {"name": "torch.optim:SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.0}
BATCHES = list(torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0)))
"""Of 4 samples of 8 numbers."""


def engines_of(
    models: nn.Module | Mapping[str, nn.Module | Callable[[], nn.Module]],
    feeder: Feeder,
    stage: int,
    ds: dict[str, Any] | None = None,
    **settings: Any,
) -> Engines:
    """Engines at a ZeRO stage that keeps no parameter complete: "net", or one by each name.

    `ds`: DeepSpeed keys. `settings`: of every engine. Collective.
    """
    by_name = {"net": models} if isinstance(models, nn.Module) else models
    threshold = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    overrides = merge({"gradient_clipping": 0.0} | threshold, ds or {})
    config = tiny_config(Path(), stage)
    engine = merge(config.engines["net"].model_dump(), {"ds_overrides": overrides} | settings)
    table = config.model_dump() | {"engines": dict.fromkeys(by_name, engine)}
    task = Task(models=by_name, train_data=[], feeder=feeder)
    return build_engines(task, type(config).model_validate(table))


def train(engines: Engines, batches: Sequence[Any]) -> list[dict[str, Any]]:
    """A step on each batch, split over the ranks along the first dimension. The ranks' reports."""
    rank, world = distributed.global_rank(), distributed.world_size()
    engines.train()
    reports = []
    for batch in batches:
        reports.append(engines.step(batch.chunk(world)[rank]))
        engines.global_step += 1
    return reports


def weights_of(engines: Engines, name: str = "net") -> dict[str, Any]:
    """The model's weights, complete, on every rank. Collective."""
    complete = {n: t for n, t in full_tensors(engines[name]) if t is not None}
    return distributed.broadcast(complete)
