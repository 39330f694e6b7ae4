"""Models with several dtypes in a 16-bit engine: what DeepSpeed casts, and the keys that help.

DeepSpeed casts every parameter to the compute dtype, also of a submodule that the user keeps in
float32, and leaves buffers as they are: tables of angles must stay in float32, but a table that is
added to 16-bit activations, or BatchNorm's statistics beside 16-bit weights, must not.
"""

import logging
import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from harness.errors import first_few
from harness.utils import dtype_name

log = logging.getLogger(__name__)

_DTYPE_ERROR = re.compile("dtype|scalar type|[Ii]nput type")


def parameters_kept_in_fp32(model: nn.Module) -> list[str]:
    """Names of the float32 parameters of a model that also has 16-bit ones."""
    parameters = dict(model.named_parameters())
    dtypes = {parameter.dtype for parameter in parameters.values()}
    if dtypes.isdisjoint({torch.bfloat16, torch.float16}):
        return []
    return _in_fp32(parameters.items())


def warn_of_cast(engine: str, names: list[str], dtype: torch.dtype) -> None:
    """Logs that parameters which the model keeps in float32 were cast to `dtype`."""
    log.warning(
        "engine %s: cast to %s, although the model keeps them in float32: %s. %s",
        *(engine, dtype_name(dtype), first_few(names), _autocast(engine, dtype)),
    )


def explain(error: Exception, engine: str, module: nn.Module, dtype: torch.dtype) -> None:
    """Adds to an error in a 16-bit engine's model that is about dtypes which keys help."""
    if dtype == torch.float32 or not _DTYPE_ERROR.search(str(error)):
        return
    note = f"engine {engine!r}: DeepSpeed has cast all parameters to {dtype_name(dtype)}."
    if names := _in_fp32(module.named_buffers()):
        note += (
            f" Buffers are still in float32 ({first_few(names)}): "
            f'engines.{engine}.buffer_dtype = "model" casts them as well.'
        )
    error.add_note(f"{note} {_autocast(engine, dtype)}")


def _autocast(engine: str, dtype: torch.dtype) -> str:
    table = "bf16" if dtype == torch.bfloat16 else "fp16"
    return (
        "To keep weights and statistics in float32, also of single submodules, replace "
        f"{table} by DeepSpeed's autocast: engines.{engine}.ds_overrides = {{ {table} = {{ enabled "
        f'= false }}, torch_autocast = {{ enabled = true, dtype = "{dtype_name(dtype)}" }} }}'
    )


def _in_fp32(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    return [name for name, tensor in tensors if tensor.dtype == torch.float32]
