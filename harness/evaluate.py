"""Evaluation on the held-out data, split over the ranks into equally many micro-batches."""

from collections.abc import Callable

import torch

from harness import distributed
from harness.data.loader import eval_shares
from harness.engine.engines import Engines
from harness.task import Task
from harness.utils import to_device


def evaluate(
    engines: Engines, task: Task, micro_batch_size: int, should_stop: Callable[[], bool]
) -> dict[str, float] | None:
    """The trained engines' losses and stats on `task.eval_data`, averaged over its samples.

    Collective; the same result on every rank. The engines are in evaluation mode meanwhile, with
    their EMA weights if they keep them. None if `should_stop`, which every rank calls after each
    micro-batch, returned True. A failure on one rank is raised on all of them, once the others have
    evaluated their shares.
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
                    except Exception as error:  # raised on all ranks, below
                        failure = error
                if should_stop():
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
    """The means over one micro-batch; none for an empty share, whose values are meaningless."""
    assert task.eval_data is not None
    batch = task.collate([task.eval_data[index] for index in share or [0]])
    stats = engines.evaluate(to_device(batch, distributed.device()))
    return {n: torch.as_tensor(v).to(torch.float64).mean() for n, v in stats.items() if share}
