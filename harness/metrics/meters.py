"""Metrics of each step, averaged over the ranks while the next steps run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from harness import distributed

Stats = Mapping[str, torch.Tensor | float]
"""Metrics of one micro-batch, by name."""


@dataclass
class StepNumbers:
    """Metrics of one step: means and sums over all ranks, and values that are not reduced."""

    local: dict[str, Any]
    """Values that are the same on all ranks, as pushed."""
    means: dict[str, float]
    """Means over the micro-batches of all ranks that reported the metric."""
    samples: int
    """Samples of the step, over all ranks."""
    tokens: int
    """Tokens of the step, over all ranks."""


@dataclass
class _Pending:
    """A step in the pipeline."""

    local: dict[str, Any]
    names: list[str]
    vector: torch.Tensor
    copied: torch.cuda.Event | None
    work: dist.Work | None = None


class StepMeter:
    """A pipeline of two stages: copied off the device, then reduced over the ranks.

    The metrics of a step are returned two pushes later, so that nothing waits for the device or for
    another rank. All ranks must push and drain at the same steps.
    """

    def __init__(self) -> None:
        self._names: list[str] = []  # in the same order on every rank
        self._exchanged: set[str] = set()  # engines whose metrics all ranks know
        self._new_names: dict[str, None] = {}  # unknown to other ranks, perhaps
        self._copying: _Pending | None = None
        self._reducing: _Pending | None = None

    def push(
        self,
        local: dict[str, Any],
        reported_by: Sequence[str],
        reports: Sequence[Stats],
        samples: int,
        tokens: int,
    ) -> list[StepNumbers]:
        """Adds a step (`reports`: one per micro-batch), and returns the completed steps.

        `reported_by`: the engines that report, the same on every rank. When one reports for the
        first time, the ranks exchange the names of its metrics. Other metrics that first appear
        during the run are reported a few steps later, once all ranks know their names.
        """
        self._new_names |= {n: None for report in reports for n in report if n not in self._names}
        if not self._exchanged.issuperset(reported_by):
            self._exchanged.update(reported_by)
            self._exchange_names()
        completed = self._shift()
        self._copying = self._pack(local, reports, samples, tokens)
        return completed

    def drain(self) -> list[StepNumbers]:
        """Returns all steps that are still in the pipeline. Blocks."""
        return self._shift() + self._shift()

    def _shift(self) -> list[StepNumbers]:
        completed = [] if self._reducing is None else [self._finish(self._reducing)]
        self._reducing, self._copying = self._copying, None
        if pending := self._reducing:
            if pending.copied is not None:
                pending.copied.synchronize()
            group = distributed.control_group()
            pending.work = dist.all_reduce(pending.vector, group=group, async_op=True)
        return completed

    def _pack(
        self, local: dict[str, Any], reports: Sequence[Stats], samples: int, tokens: int
    ) -> _Pending:
        """The vector is: sums by name, counts by name, samples, tokens, number of new names."""
        device = distributed.device()
        values_by_name = [[r[name] for r in reports if name in r] for name in self._names]
        sums = [torch.stack([_scalar(0.0), *map(_scalar, v)]).sum() for v in values_by_name]
        counts = [*map(len, values_by_name), samples, tokens, len(self._new_names)]
        tail = torch.tensor(counts, dtype=torch.float64, device=device)
        vector = torch.cat([torch.stack(sums), tail]).to("cpu", non_blocking=True)
        copied = None
        if device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record()
        return _Pending(local, self._names, vector, copied)

    def _finish(self, pending: _Pending) -> StepNumbers:
        assert pending.work is not None
        pending.work.wait()
        size = len(pending.names)
        numbers = pending.vector.tolist()
        pairs = zip(pending.names, numbers[:size], numbers[size : 2 * size], strict=True)
        means = {name: total / count for name, total, count in pairs if count}
        samples, tokens, new_names = map(int, numbers[2 * size :])
        if new_names:
            self._exchange_names()
        return StepNumbers(pending.local, means, samples, tokens)

    def _exchange_names(self) -> None:
        new = [name for names in distributed.all_gather(list(self._new_names)) for name in names]
        self._names = list(dict.fromkeys([*self._names, *new]))
        self._new_names.clear()


def _scalar(value: torch.Tensor | float) -> torch.Tensor:
    """The mean of a value, as a float64 scalar on this rank's device."""
    on_device = torch.as_tensor(value, device=distributed.device()).detach()
    return on_device.to(torch.float64).mean()
