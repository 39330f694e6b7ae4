"""The norm that DeepSpeed decides by whether a step is taken, and the largest one that is taken.

DeepSpeed's optimizers compute the norm of the reduced gradient, the same on all ranks, and skip the
step if `is_invalid_grad_norm` of it is true, for which they wait for the device. Here the same call
also compares it with a bound, and remembers it.
"""

import importlib
import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness.waiting import in_collective
from harness.zero.parameters import is_expert

MODULES = (
    "zero.stage_1_and_2",
    "zero.stage3",
    "bf16_optimizer",
    "fp16.fused_optimizer",
    "fp16.unfused_optimizer",
)
"""Below DeepSpeed's `runtime`; each has imported `is_invalid_grad_norm` from utils.py."""


class StepNorm:
    """The norm of the step in progress in this process; times the loss scale."""

    largest: float = math.inf
    """A step with a larger one is skipped."""
    found: Tensor | float | None = None
    """None before it is computed; and where DeepSpeed finds an inf or NaN without it."""
    gradients: "PlainGradients | None" = None
    """In fp32 at stage 0."""


def patch_norms() -> None:
    """Makes DeepSpeed's optimizers skip steps whose norm is above `StepNorm.largest`."""
    for name in MODULES:
        module: Any = importlib.import_module(f"deepspeed.runtime.{name}")
        module.is_invalid_grad_norm = is_rejected


def is_rejected(norm: Tensor | float) -> bool:
    """Whether a step with this norm is skipped. DeepSpeed has -1 for one that is not finite."""
    StepNorm.found = norm
    value = float(norm)  # the one wait, instead of nine kernels and a wait
    return not (0 <= value <= StepNorm.largest and math.isfinite(value))


class PlainGradients:
    """The reduced gradients in fp32 at stage 0, where DeepSpeed does not wrap the optimizer, and
    computes their norm only to clip them: here it is computed once, to decide and to clip."""

    def __init__(self, module: nn.Module):
        """Waits for the device. Collective if the model has experts."""
        parameters = [p for p in module.parameters() if p.grad is not None]
        self._gradients = [p.grad for p in parameters if p.grad is not None]
        norms: Any = torch._foreach_norm(self._gradients)  # pyright: ignore[reportPrivateImportUsage]
        square = float(torch.stack(norms).pow(2).sum()) if norms else 0.0  # the one wait
        self._norm = np.sqrt(np.float32(square))
        if any(map(is_expert, parameters)):  # other gradients are alike on all ranks
            norm = torch.tensor(self._norm, device=parameters[0].device)
            with in_collective:
                dist.all_reduce(norm.div_(dist.get_world_size()))
            self._norm = np.float32(norm.item())
        self.norm = float(self._norm)
        """Their L2 norm; with experts, which are not alike on all ranks, the mean of the ranks'."""

    @torch.no_grad()
    def clip(self, norm: float) -> None:
        """To that norm, with the same bits as DeepSpeed (runtime/utils.py, `clip_grad_norm_`)."""
        factor = np.float32(norm) / (self._norm + np.float32(1e-6))
        if not factor >= 1:
            torch._foreach_mul_(self._gradients, float(factor))  # pyright: ignore[reportPrivateImportUsage]
