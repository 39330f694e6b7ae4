"""A GPU that computes nothing: which kernels a program would launch on it, and where it would wait.

PyTorch's fake tensors have shapes and devices but no values. A program that reads a value fails;
one that copies between host and device is counted.
"""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

READS = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2"}
"""Operations whose result the host waits for."""
NO_KERNELS = set(
    "view _unsafe_view reshape expand slice select split split_with_sizes chunk narrow t transpose "  # noqa: SIM905
    "permute squeeze unsqueeze unbind unfold flatten unflatten diagonal detach alias as_strided "
    "view_as_real set_ resize_ lift_fresh is_pinned empty empty_like empty_strided new_empty "
    "new_empty_strided device layout".split()
)
"""Views and allocations."""
CHUNK, BLOCKS = 65536, 320
"""Elements of a block, and blocks of a launch, in torch's kernels for lists of tensors."""
LISTS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
"""Tensors of a launch in these kernels, by the number of lists."""
TENSOR = torch.tensor
CONCATENATED = 128
"""Tensors of a launch of `cat` and `stack`."""


class Launches(TorchDispatchMode):
    """Counts kernels by operation, and notes operations that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.waits: list[str] = []

    @property
    def total(self) -> int:
        return self.kernels.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        result = func(*args, **kwargs)
        if name in READS or _is_blocking_copy(name, args, kwargs, result):
            self.waits.append(name)
        if name not in NO_KERNELS and not name.startswith("sym_") and _on_gpu(args, result):
            self.kernels[name] += launches_of(name, args)
        return result


def _on_gpu(args: Any, result: Any) -> bool:
    leaves = tree_leaves((args, result))
    return any(isinstance(leaf, Tensor) and leaf.device.type == "cuda" for leaf in leaves)


def _is_blocking_copy(name: str, args: Any, kwargs: Any, result: Any) -> bool:
    if name == "_to_copy":
        source, target, is_asynchronous = args[0], result, kwargs.get("non_blocking", False)
    elif name == "copy_":
        target, source = args[:2]
        is_asynchronous = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
    else:
        return False
    return source.device.type != target.device.type and not is_asynchronous


def launches_of(name: str, args: Any) -> int:
    """The kernels of an operation."""
    lists = [a for a in args if isinstance(a, list | tuple) and a and isinstance(a[0], Tensor)]
    if not lists or name == "index":
        return 1
    tensors = lists[0]
    if name in ("cat", "stack"):
        return math.ceil(len(tensors) / CONCATENATED)
    shapes = [[t.shape for t in one] for one in lists if one[0].ndim]
    if name.startswith("_foreach_") and any(one != shapes[0] for one in shapes):
        return len(tensors)  # torch then calls the kernel of one tensor for each
    blocks = sum(math.ceil(t.numel() / CHUNK) for t in tensors)
    return max(math.ceil(len(tensors) / LISTS[min(5, len(lists))]), math.ceil(blocks / BLOCKS))


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Inside, tensors on "cuda" are fake ones.

    Replaces what sets a device guard in torch's C++ code, which fails without a GPU: Python
    indexing, in-place copies and fills; and what depends on values.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "__getitem__", _picked)
        patch.setattr(Tensor, "__setitem__", _placed)
        patch.setattr(Tensor, "copy_", _copied)
        patch.setattr(Tensor, "fill_", lambda self, value: aten.fill_(self, value))
        patch.setattr(Tensor, "zero_", lambda self: aten.zero_(self))
        patch.setattr(Tensor, "__invert__", lambda self: aten.bitwise_not(self))
        patch.setattr(torch, "bincount", _counted)
        patch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
        patch.setattr(torch, "tensor", _made)
        for kind in (nn.Linear, nn.Embedding, nn.RMSNorm):
            patch.setattr(kind, "reset_parameters", lambda self: None)
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield


def _made(data: Any, *args: Any, pin_memory: bool = False, **settings: Any) -> Tensor:
    return TENSOR(data, *args, **settings)  # which fails to pin


def _copied(self: Tensor, other: Tensor, non_blocking: bool = False) -> Tensor:
    return aten.copy_(self, other, non_blocking)


def _counted(slots: Tensor, weights: None = None, minlength: int = 0) -> Tensor:
    return torch.zeros(minlength, dtype=torch.int64, device=slots.device)


def _picked(self: Tensor, index: Any) -> Tensor:
    """As Python indexing, from the operations that it is made of."""
    index = list(index) if isinstance(index, tuple) else [index]
    if any(i is Ellipsis for i in index):
        at = next(number for number, i in enumerate(index) if i is Ellipsis)
        fill = self.dim() - sum(i is not None and i is not Ellipsis for i in index)
        index[at : at + 1] = [slice(None)] * fill
    picked, dim = self, 0
    tensors: list[Tensor | None] = []
    for i in index:
        if i is None:
            picked = aten.unsqueeze(picked, dim)
        elif isinstance(i, slice):
            if i != slice(None):
                picked = aten.slice(picked, dim, i.start, i.stop, i.step or 1)
        elif not isinstance(i, Tensor):
            picked = aten.select(picked, dim, int(i))
            continue
        tensors.append(i if isinstance(i, Tensor) else None)
        dim += 1
    return aten.index(picked, tensors) if any(t is not None for t in tensors) else picked


def _placed(self: Tensor, index: Any, value: Any) -> None:
    view = _picked(self, index)
    if isinstance(value, Tensor):
        aten.copy_(view, value)
    else:
        aten.fill_(view, value)
