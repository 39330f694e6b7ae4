"""Notices what changes weights through `weight.data`, which torch does not count as a change.

With masters the next step undoes such a change, and stage 3 drops it with the gathered weight.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from harness.zero.fetches import is_missing
from harness.zero.parameters import is_sharded
from harness.zero.reads import attribute

_DATA_OF = "ds_data_of"
"""The attribute of `weight.data`: the weight's name."""


class Writes(TorchFunctionMode):
    """Within it, changes of weights through `data` are recorded, by name."""

    def __init__(self, parameters: Mapping[str, Tensor]):
        """`parameters`: those that must not be changed."""
        super().__init__()
        self.changed: set[str] = set()
        self._names = {id(p): name for name, p in parameters.items()}

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """In the block nothing is recorded."""
        names, self._names = self._names, {}
        try:
            yield
        finally:
            self._names = names

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if torch.compiler.is_compiling() or not self._names:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        is_accessor = name in ("__get__", "__set__")
        if is_accessor and attribute(func) == "data":
            return self._access(func, name, *args)
        path = "" if is_accessor else _written(name, args)
        before = args[0].clone() if path else None
        result = func(*args, **kwargs)
        if before is not None and not torch.equal(before, args[0]):
            self.changed.add(path)
        return result

    def _access(self, func: Any, name: str, weight: Any, *new: Tensor) -> Any:
        """Gets or sets the data of a tensor."""
        path = "" if is_missing(weight) else self._names.get(id(weight), "")
        if name == "__get__":
            data = func(weight)
            if path:
                setattr(data, _DATA_OF, path)
            return data
        old = weight.detach()
        if path and old.shape == new[0].shape:
            if not torch.equal(old, new[0].to(old)):
                self.changed.add(path)
        elif path and not is_sharded(weight):  # DeepSpeed gathers and releases those
            self.changed.add(path)
        return func(weight, *new)


def _written(name: str, args: Any) -> str:
    """The weight that a function of that name writes to, through its data or a view of it."""
    is_in_place = name == "__setitem__" or name.startswith("__i")
    if not (is_in_place or (name.endswith("_") and not name.endswith("__"))):
        return ""
    value = args[0] if args else None
    if not isinstance(value, Tensor):
        return ""
    found = vars(value).get(_DATA_OF, "")
    return found or (vars(value._base).get(_DATA_OF, "") if value._base is not None else "")
