"""Linear layers of NVIDIA's TransformerEngine that multiply in fp8 (extra: te). GPUs only."""

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from harness.errors import ConfigError

_te: Any = importlib.import_module("transformer_engine.pytorch")


class Float8Linear(_te.Linear):
    """`transformer_engine.pytorch.Linear` under its own fp8 context, with its default recipe."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]; all but the last size a multiple of 8."""
        with _te.fp8_autocast(enabled=True):
            return super().forward(input)


def float8_linear(old: nn.Linear) -> Float8Linear:
    """Raises ConfigError where TransformerEngine says that there is no fp8, and for sizes that are
    no multiple of 16."""
    is_available, reason = (
        _te.fp8.check_fp8_support() if torch.cuda.is_available() else (False, "no GPU")
    )
    if not is_available:
        raise ConfigError(f"te.float8_linear: no fp8 on this machine: {reason}")
    if old.in_features % 16 or old.out_features % 16:
        raise ConfigError(
            f"te.float8_linear: the sizes must be multiples of 16, found [{old.out_features}, "
            f"{old.in_features}]: exclude this layer"
        )
    return Float8Linear(
        old.in_features,
        old.out_features,
        bias=old.bias is not None,
        params_dtype=old.weight.dtype,
        device=old.weight.device,
    )
