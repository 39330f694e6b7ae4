"""The norm that DeepSpeed decides by whether a step is taken, and the largest one that is taken.

DeepSpeed's optimizers compute the norm of the reduced gradient, the same on all ranks, and skip the
step if `is_invalid_grad_norm` of it is true, for which they wait for the device. Here the same call
also compares it with a bound, and remembers it.
"""

import importlib
import math
from typing import Any

import torch
from torch import Tensor

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


def plain_norm(module: torch.nn.Module) -> Tensor:
    """In fp32 at stage 0, where DeepSpeed neither wraps the optimizer nor computes it."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)
