"""Which tensors share memory, and how each is a view of what must be kept once.

Two tensors share memory if an element of one lies where an element of the other does, in the same
storage. Neighbours in one storage share nothing, nor do two halves of the columns of a matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from harness.errors import FormatError


@dataclass(frozen=True)
class Base:
    """What is kept of some tensors: all of them are views of it, `offset` elements from its first.

    `owner` is the number of the tensor that it is; None if none of them holds all the others, or
    itself alone without repetition: then it is the stretch of memory that they lie in.
    """

    tensor: torch.Tensor
    owner: int | None
    offsets: dict[int, int]
    """By the number of the tensor."""


def shared(tensors: Sequence[torch.Tensor], names: Sequence[str]) -> list[Base]:
    """What to keep of the tensors, in order of the first tensor that needs it.

    Raises FormatError, with `names`, where one memory has two dtypes.
    """
    bases: list[Base] = []
    for group in _groups(tensors):
        first = group[0]
        for number in group:
            if tensors[number].dtype != tensors[first].dtype:
                raise FormatError(
                    f"{names[number]}: shares memory with {names[first]}, but is "
                    f"{tensors[number].dtype}, not {tensors[first].dtype}; clone one of them"
                )
        owner = _holder(tensors, group)
        base = tensors[first if owner is None else owner]
        if owner is None:
            start, end = _stretch(tensors, group)
            base = base.as_strided((end - start,), (1,), start)
        start = int(base.storage_offset())
        offsets = {number: int(tensors[number].storage_offset()) - start for number in group}
        bases.append(Base(base, owner, offsets))
    return bases


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the elements fill a stretch of memory, each once: contiguous, or permuted."""
    expected = 1
    for step, size in _steps(shape, stride):
        if step != expected:
            return False
        expected *= size
    return True


def reach(shape: Sequence[int], stride: Sequence[int]) -> int:
    """The elements of memory from the first to the last of a tensor."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def unexpanded(tensor: torch.Tensor, stride: Sequence[int] | None = None) -> torch.Tensor:
    """The tensor with one element left of every dimension whose stride is 0."""
    for dimension, step in enumerate(tensor.stride() if stride is None else stride):
        if step == 0 and tensor.size(dimension) > 1:
            tensor = tensor.narrow(dimension, 0, 1)
    return tensor


def _steps(shape: Sequence[int], stride: Sequence[int]) -> list[tuple[int, int]]:
    """Stride and size of the dimensions that have any, the innermost first."""
    return sorted((step, size) for step, size in zip(stride, shape, strict=True) if size > 1)


def _repeats(tensor: torch.Tensor) -> bool:
    """Whether two elements may be the same memory, apart from expanded dimensions."""
    last = 0
    for step, size in _steps(*_plain(tensor)):
        if step <= last:
            return True
        last += step * (size - 1)
    return False


def _plain(tensor: torch.Tensor) -> tuple[torch.Size, tuple[int, ...]]:
    tensor = unexpanded(tensor)
    return tensor.shape, tensor.stride()


def _stretch(tensors: Sequence[torch.Tensor], group: Sequence[int]) -> tuple[int, int]:
    """Where the tensors, of one dtype, begin and end in their storage, in elements."""
    start = min(int(tensors[number].storage_offset()) for number in group)
    return start, max(_end(tensors[number]) for number in group)


def _end(tensor: torch.Tensor) -> int:
    return int(tensor.storage_offset()) + reach(tensor.shape, tensor.stride())


def _bytes(tensor: torch.Tensor) -> tuple[int, int]:
    return int(tensor.storage_offset()) * tensor.itemsize, _end(tensor) * tensor.itemsize


def _holder(tensors: Sequence[torch.Tensor], group: Sequence[int]) -> int | None:
    """The tensor of a group that holds all others, a contiguous one if there is one."""

    def place(number: int) -> tuple[object, ...]:
        tensor = tensors[number]
        return tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype

    if len(set(map(place, group))) == 1:
        return None if _repeats(tensors[group[0]]) else group[0]
    extents = {number: _bytes(tensors[number]) for number in group}
    whole = min(start for start, _ in extents.values()), max(end for _, end in extents.values())
    holders = [
        number
        for number in group
        if extents[number] == whole and is_dense(tensors[number].shape, tensors[number].stride())
    ]
    return min(holders, key=lambda number: not tensors[number].is_contiguous(), default=None)


def _groups(tensors: Sequence[torch.Tensor]) -> list[list[int]]:
    """The tensors, by number, in sets that share memory, in order of their first members."""
    storages: dict[tuple[torch.device, int], list[int]] = {}
    found: list[list[int]] = []
    for number, tensor in enumerate(tensors):
        if tensor.numel():
            storage = tensor.device, tensor.untyped_storage().data_ptr()
            storages.setdefault(storage, []).append(number)
        else:
            found.append([number])
    for members in storages.values():
        extents = {number: _bytes(tensors[number]) for number in members}
        end = -1
        near: list[list[int]] = []
        for number in sorted(members, key=extents.__getitem__):
            if extents[number][0] >= end:
                near.append([])
            near[-1].append(number)
            end = max(end, extents[number][1])
        for group in near:
            found += _split(tensors, sorted(group))
    return sorted(found)


def _split(tensors: Sequence[torch.Tensor], group: list[int]) -> list[list[int]]:
    """Sets that share memory out of tensors whose stretches of one storage overlap."""
    if len(group) == 1 or _holder(tensors, group) is not None:
        return [group]
    unit = min(tensors[number].itemsize for number in group)
    extents = {number: _bytes(tensors[number]) for number in group}
    start = min(start for start, _ in extents.values())
    end = max(end for _, end in extents.values())
    taken = torch.zeros((end - start) // unit, dtype=torch.int32)  # by which tensor last, from 1
    leaders = list(range(len(group)))
    for order, number in enumerate(group):
        tensor, (begin, stop) = tensors[number], extents[number]
        if _repeats(tensor):
            own = taken[(begin - start) // unit : (stop - start) // unit]
        else:
            shape, stride = _plain(tensor)
            units = tensor.itemsize // unit
            steps = (*(step * units for step in stride), 1)
            own = taken.as_strided((*shape, units), steps, (begin - start) // unit)
        for other in torch.bincount(own.flatten()).nonzero().flatten().tolist():
            if other:
                old = leaders[other - 1]
                leaders = [leaders[order] if leader == old else leader for leader in leaders]
        own.fill_(order + 1)
    sets: dict[int, list[int]] = {}
    for order, number in enumerate(group):
        sets.setdefault(leaders[order], []).append(number)
    return list(sets.values())
