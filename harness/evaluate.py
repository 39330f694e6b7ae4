"""Held-out evaluation: every rank its share, the same number of micro-batches on each."""

from collections.abc import Callable

import torch

from harness import distributed
from harness.config.config import Config
from harness.data.loader import eval_shares
from harness.engine.engines import Engines
from harness.errors import ConfigError, TaskError
from harness.task import Task
from harness.utils import to_device


def evaluate(
    engines: Engines, task: Task, micro_batch_size: int, is_stopped: Callable[[], bool]
) -> dict[str, float] | None:
    """The trained engines' losses and stats on `task.eval_data`, averaged over its samples.

    Collective. The engines are in evaluation mode meanwhile, and have the average for their weights
    where one is kept. The same on every rank; None if
    `is_stopped`, which every rank asks after each micro-batch, said so. What fails on one rank
    alone is raised on all of them, once the others have done their shares.
    """
    sums: dict[str, torch.Tensor] = {}
    weights: dict[str, int] = {}
    rank, world_size = distributed.global_rank(), distributed.world_size()
    failure: Exception | None = None
    engines.eval()
    try:
        with engines.averaged():
            for share in eval_shares(len(task.eval_data or ()), micro_batch_size, rank, world_size):
                if failure is None:
                    try:
                        for name, mean in _means(engines, task, share).items():
                            sums[name] = sums.get(name, 0) + mean * len(share)
                            weights[name] = weights.get(name, 0) + len(share)
                    except Exception as error:  # the others must hear of it
                        failure = error
                if is_stopped():
                    return None
    finally:
        engines.train()
    with distributed.raise_on_all_ranks("evaluation"):
        if failure is not None:
            raise failure
    totals: dict[str, float] = {}
    counts: dict[str, int] = {}
    for share in distributed.all_gather({n: (float(sums[n]), weights[n]) for n in sums}):
        for name, (total, count) in share.items():
            totals[name] = totals.get(name, 0.0) + total
            counts[name] = counts.get(name, 0) + count
    return {name: total / counts[name] for name, total in totals.items()}


def _means(engines: Engines, task: Task, share: range) -> dict[str, torch.Tensor]:
    """The numbers of one micro-batch; none of one that counts for nothing, which may be NaN."""
    assert task.eval_data is not None
    batch = task.collate([task.eval_data[index] for index in share or [0]])
    found = engines.evaluate(to_device(batch, distributed.device()))
    return {n: torch.as_tensor(v).to(torch.float64).mean() for n, v in found.items() if share}


def check_eval_data(task: Task, config: Config) -> None:
    """Raises TaskError or ConfigError if there is nothing to evaluate on where there should be."""
    if task.eval_data is None:
        if config.trainer.eval_every:
            raise ConfigError("trainer.eval_every is set, but the task has no eval_data")
    elif not (hasattr(task.eval_data, "__getitem__") and hasattr(task.eval_data, "__len__")):
        raise TaskError("eval_data is no map-style dataset (`__len__` and `__getitem__`)")
    elif len(task.eval_data) == 0:
        raise TaskError(f"eval_data: {type(task.eval_data).__name__} has no items")
