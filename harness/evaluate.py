"""Held-out evaluation: every rank its share, the same number of micro-batches on each."""

import torch

from harness import distributed
from harness.data import eval_batches
from harness.engines import Engines
from harness.task import Task
from harness.utils import to_device


def evaluate(engines: Engines, task: Task, micro_batch_size: int) -> dict[str, float]:
    """The trained engines' losses and stats on `task.eval_data`, averaged over its samples.

    Collective. The engines are in evaluation mode meanwhile. The same on every rank.
    """
    sums: dict[str, torch.Tensor] = {}
    weights: dict[str, int] = {}
    rank, world_size = distributed.global_rank(), distributed.world_size()
    shares = eval_batches(task.eval_data, micro_batch_size, task.collate, rank, world_size)
    engines.eval()
    for batch, samples in shares:
        for name, value in engines.evaluate(to_device(batch, distributed.device())).items():
            if samples:  # a NaN on a batch that counts for nothing must not count
                mean = torch.as_tensor(value).to(torch.float64).mean()
                sums[name] = sums.get(name, 0) + mean * samples
                weights[name] = weights.get(name, 0) + samples
    engines.train()
    totals: dict[str, float] = {}
    counts: dict[str, int] = {}
    for share in distributed.all_gather({n: (float(sums[n]), weights[n]) for n in sums}):
        for name, (total, count) in share.items():
            totals[name] = totals.get(name, 0.0) + total
            counts[name] = counts.get(name, 0) + count
    return {name: total / counts[name] for name, total in totals.items()}
