"""Refuses what would read weights that ZeRO 3 has not gathered: their sum would be 0, without an
error, and an average of them would not follow."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from harness.errors import TaskError
from harness.utils import is_compiled
from harness.zero import fetches

_DESCRIBES = {
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "get_device"),
    *("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"),
    *("is_floating_point", "is_complex", "is_contiguous", "is_shared", "data_ptr"),
    *("_has_compatible_shallow_copy_type",),  # Module.to does
    *("__hash__", "__repr__", "__format__", "__set__", "__deepcopy__", "__reduce_ex__"),
    *("requires_grad_", "register_hook", "register_post_accumulate_grad_hook", "retain_grad"),
}
"""Functions of a tensor that need no values."""
_CONVERTS = {"to", "type", "type_as", "float", "bfloat16", "half", "cpu", "cuda", "contiguous"}
"""Functions that return their first argument itself if it is already what they convert to; of
others they take no values."""
_ALIASES = {"data", "T", "mT", "H", "mH", "real"}
"""Attributes of a tensor that are the same memory."""
_OF_EMPTY = "ds_empty_of"
"""The attribute of an alias of a weight, like `weight.data` or `weight.detach()`: its name."""


class _Reads(TorchFunctionMode):
    def __init__(self, engine: str, module: nn.Module):
        super().__init__()
        self._engine = engine
        self._names = {id(p): name for name, p in module.named_parameters()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if torch.compiler.is_compiling():  # torch's compiler reads this, too
            return func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        is_alias = name == "detach" or (name == "__get__" and attribute(func) in _ALIASES)
        reads = not is_alias and name not in _DESCRIBES and name != "__get__"
        if name in _CONVERTS:
            result = func(*args, **(kwargs or {}))
            is_new = isinstance(result, Tensor) and result is not args[0]
            reads = is_new and bool(self._missing(args[0]))
            if not reads:
                return result
        if reads and not fetches.Backward.is_running:  # where DeepSpeed itself does
            for value in (*args, *(kwargs or {}).values()):
                for each in value if isinstance(value, list | tuple) else (value,):
                    if isinstance(each, Tensor) and (path := self._missing(each)):
                        raise self._error(path, name)
        result = func(*args, **(kwargs or {}))
        if is_alias and (path := self._missing(args[0])):
            setattr(result, _OF_EMPTY, path)
        return result

    def _missing(self, value: Any) -> str:
        if fetches.is_missing(value):
            return self._names.get(id(value), "")
        return vars(value).get(_OF_EMPTY, "")

    def _error(self, path: str, function: str) -> TaskError:
        return TaskError(
            f"engine {self._engine!r}: {function} was called with parameter {path!r} outside of "
            "the module that has it, where at ZeRO 3 it is empty. To read weights there, like a "
            f'penalty on all of them does, set engines.{self._engine}.unused_parameters = "zeros", '
            "which gathers the model for each micro-batch, or use ZeRO 2; to change them, like an "
            "average that follows them, use `with engine.edit_weights() as model`"
        )


def attribute(getter: Any) -> str:
    """The name of the attribute that a getter or setter is of, as a TorchFunctionMode sees it."""
    return getattr(getattr(getter, "__self__", None), "__name__", "")


@contextmanager
def refused(engine: str, module: nn.Module) -> Iterator[None]:
    """In the block a TaskError names the parameter and the function that would read it.

    Not if a part of the model is compiled, which would be compiled for the block alone.
    """
    if is_compiled(module):
        yield
        return
    with _Reads(engine, module):
        yield
