"""Linear layers of NVIDIA's TransformerEngine with fp8 multiplication. GPUs only."""

import importlib
from typing import Any

from torch import Tensor, nn

from harness import distributed
from harness.errors import ConfigError

_te: Any = importlib.import_module("transformer_engine.pytorch")
_recipe: Any = importlib.import_module("transformer_engine.common.recipe")


class Float8Linear(_te.Linear):
    """`transformer_engine.pytorch.Linear` inside an fp8 context.

    Scales come from the current tensors, not from those of earlier steps, so there is no state
    besides the weights, and a resumed run continues exactly.
    """

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]; the product of the other sizes must be a
        multiple of 8."""
        with _te.autocast(enabled=True, recipe=_recipe.Float8CurrentScaling()):
            return super().forward(input)


def float8_linear(old: nn.Linear) -> Float8Linear:
    """Raises ConfigError if TransformerEngine reports no fp8 support, and for sizes that are not
    multiples of 16."""
    has_gpu = distributed.device().type == "cuda"
    available, reason = _te.is_fp8_available(return_reason=True) if has_gpu else (False, "no GPU")
    if not available:
        raise ConfigError(f"float8_linear: TransformerEngine reports no fp8 support: {reason}")
    if old.in_features % 16 or old.out_features % 16:
        raise ConfigError(
            f"float8_linear: the weight is [{old.out_features}, {old.in_features}], expected "
            "multiples of 16: exclude this layer"
        )
    return Float8Linear(
        old.in_features,
        old.out_features,
        bias=old.bias is not None,
        params_dtype=old.weight.dtype,
        device=old.weight.device,
    )
