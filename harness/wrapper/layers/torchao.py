"""torchao's linear layers with 8-bit multiplication in training (pip install torchao).

Weights, gradients and the optimizer's inputs keep the model's dtype: inputs, weights and output
gradients are quantized again for each multiplication, in forward and backward.
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
"""Minimum CUDA compute capability for fp8 multiplication (Ada)."""


def float8_linear(old: nn.Linear) -> nn.Module:
    """fp8, each tensor scaled by its largest value (Micikevicius et al., "FP8 Formats for Deep
    Learning", 2022).

    Raises ConfigError on a GPU without fp8, and for sizes that are not multiples of 16.
    """
    device = distributed.device()
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < FLOAT8_CAPABILITY:
            raise ConfigError(
                f"float8_linear: the GPU has compute capability {capability}, expected at least "
                f"{FLOAT8_CAPABILITY}: use int8_linear"
            )
    if old.in_features % 16 or old.out_features % 16:
        raise ConfigError(
            f"float8_linear: the weight is [{old.out_features}, {old.in_features}], expected "
            "multiples of 16: exclude this layer"
        )
    return _float8.convert_to_float8_training(old)


def int8_linear(old: nn.Linear) -> nn.Module:
    """int8, each row and column scaled by its largest value. A prototype, according to torchao."""
    with torch.device("meta"):
        return _int8.Int8MixedPrecisionTrainingLinear(
            old.in_features,
            old.out_features,
            bias=old.bias is not None,
            config=_int8.Int8MixedPrecisionTrainingConfig(),
        )
