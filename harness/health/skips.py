"""Optimizer steps that changed nothing: why, and on which rank it began.

Whether a step is skipped is known on all ranks within the step, from the norm of the reduced
gradient. Only whose loss it was is not: that is summed with the step's vector, behind the step.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from harness import distributed
from harness.errors import first_few

log = logging.getLogger(__name__)
log_on_leader = distributed.global_leader_only(log.log)

Reason = Literal["nonfinite", "spike", "overflow"]
"""Why: a gradient is not finite; its norm is far above those before; or it is not finite in fp16,
where a smaller loss scale is tried next."""

WHAT: dict[Reason, str] = {
    "nonfinite": "its gradients are not finite",
    "overflow": "its gradients are not finite",
    "spike": "the norm of its gradients is a spike",
}


def reason_of(norm: Tensor | float, is_finding_scale: bool) -> Reason:
    """Why a step with that gradient norm was skipped. `is_finding_scale`: fp16 has a smaller scale
    to try."""
    if math.isfinite(norm):
        return "spike"
    return "overflow" if is_finding_scale else "nonfinite"


@dataclass(frozen=True)
class Skip:
    """One optimizer step of one engine that was skipped. All but the last are alike on all
    ranks."""

    step: int
    """Of the run."""
    engine: str
    reason: Reason
    norm: float
    """The gradient norm; inf unless the reason is "spike"."""
    count: int
    """Of the engine's skips so far, this one included."""
    in_a_row: int
    """Of these, the last ones; without those whose reason is "overflow"."""
    loss_scale: float
    """From the next step on."""
    is_own_loss_finite: bool
    """Whether this rank's losses in the step were finite."""


class Skips:
    """The steps skipped in a run; a part of the step's vector."""

    def __init__(self) -> None:
        self._last: list[Skip] = []
        """Those in the last step of the run that had any."""
        self._recorded: list[Skip] = []
        """Until they are contributed."""
        self._summing: list[Skip] = []
        """Those that the vector is being summed for."""

    def record(self, skip: Skip) -> None:
        """Records a skipped step, the same on all ranks."""
        self._last = [*self.of(skip.step), skip]
        self._recorded.append(skip)

    def of(self, step: int) -> list[Skip]:
        """Those in a step of the run, which is the last."""
        return [skip for skip in self._last if skip.step == step]

    def clear(self) -> None:
        """Forgets the last step: the run returns to an earlier one."""
        self._last = []

    def contribute(self) -> Sequence[float]:
        """For each skip a number by rank: 1 from a rank whose own loss was not finite."""
        self._summing, self._recorded = self._recorded, []
        rank, ranks = distributed.global_rank(), range(distributed.world_size())
        return [
            float(rank == other and not skip.is_own_loss_finite)
            for skip in self._summing
            for other in ranks
        ]

    def receive(self, sums: Sequence[float]) -> None:
        """Logs the skips, each with the ranks whose loss was not finite."""
        size = distributed.world_size()
        for number, skip in enumerate(self._summing):
            flags = sums[number * size : (number + 1) * size]
            ranks = [rank for rank, flag in enumerate(flags) if flag]
            # In fp16 this is how the loss scale is found.
            level = logging.INFO if skip.reason == "overflow" else logging.WARNING
            log_on_leader(
                level,
                "step %d: engine %s: skipped, as %s (%d so far)%s",
                *(skip.step, skip.engine, WHAT[skip.reason], skip.count, _whose(skip, ranks)),
            )
        self._summing = []


def _whose(skip: Skip, ranks: Sequence[int]) -> str:
    """What is known about where it began. `ranks`: whose loss was not finite."""
    if ranks:
        return f": the loss of rank {first_few(ranks)} is not finite"
    if skip.reason == "spike":
        return f": {skip.norm:.4g}"
    if skip.reason == "overflow":
        return f"; loss scale {skip.loss_scale:g}"
    return ": every loss is, so it began in a backward"
