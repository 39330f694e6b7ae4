"""Linear layers of torchao that multiply in 8 bits while they train (pip install torchao).

Weights, gradients and the optimizer's inputs keep the model's dtype: inputs, weights and output
gradients are rounded again for every multiplication, in forward and backward.
"""

import importlib
from typing import Any

import torch
from torch import nn

from harness import distributed
from harness.errors import ConfigError

_float8: Any = importlib.import_module("torchao.float8")
_int8: Any = importlib.import_module("torchao.prototype.quantized_training")

FLOAT8_CAPABILITY = (8, 9)
"""The lowest CUDA compute capability with fp8 multiplication: Ada; Hopper has it, too."""


def float8_linear(old: nn.Linear) -> nn.Module:
    """fp8, each tensor scaled by its largest value (Micikevicius et al., "FP8 Formats for Deep
    Learning", 2022).

    Raises ConfigError on a GPU without fp8, and for sizes that are not multiples of 16.
    """
    device = distributed.device()
    if device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        if found < FLOAT8_CAPABILITY:
            raise ConfigError(
                f"float8_linear: a GPU of compute capability {FLOAT8_CAPABILITY} or more is "
                f"needed, found {found}: use int8_linear"
            )
    if old.in_features % 16 or old.out_features % 16:
        raise ConfigError(
            f"float8_linear: the sizes must be multiples of 16, found [{old.out_features}, "
            f"{old.in_features}]: exclude this layer"
        )
    return _float8.convert_to_float8_training(old)


def int8_linear(old: nn.Linear) -> nn.Module:
    """int8, each row and column scaled by its largest value; torchao calls it a prototype."""
    with torch.device("meta"):
        return _int8.Int8MixedPrecisionTrainingLinear(
            old.in_features,
            old.out_features,
            bias=old.bias is not None,
            config=_int8.Int8MixedPrecisionTrainingConfig(),
        )
