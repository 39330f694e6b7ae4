"""The tiny classifier on two sources, with or without weighed losses. `nan_at`: a step whose loss
is not a number when it is first taken."""

from typing import Any

import torch

from harness.config import Config
from harness.task import Task, default_feeder
from tests.tasks.tiny_task import Classifier, Points


def build(config: Config) -> Task:
    args: dict[str, Any] = {"weigh": False, "sources": {"a": 20, "b": 50}, "nan_at": 0}
    args |= config.task.args
    nan_at = {args["nan_at"]}

    def feed(engine: Any, batch: Any) -> tuple[torch.Tensor, Any]:
        loss, stats = default_feeder(engine, batch)
        step = engine.counters.global_step + 1
        is_bad = step in nan_at
        nan_at.discard(step)
        return loss * torch.nan if is_bad else loss, stats

    sources = {name: Points(count, seed=count) for name, count in args["sources"].items()}
    return Task(
        models={"net": Classifier()},
        train_data=sources,
        feeder=feed,
        weigh=(lambda batch: len(batch[0])) if args["weigh"] else None,
    )
