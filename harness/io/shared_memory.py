"""Which tensors share memory, and how each is a view of a base that is stored once.

Two tensors share memory if an element of one has the address of an element of the other. Neighbors
in a storage share nothing, and neither do two halves of the columns of a matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from harness.errors import FormatError
from harness.utils import may_overlap


@dataclass(frozen=True)
class Base:
    """A tensor that is stored once for several, which are views of it.

    `owner` is the number of the tensor that contains all the others. None if there is none, or a
    single tensor overlaps itself: the base is then the extent of memory that they are in.
    """

    tensor: torch.Tensor
    owner: int | None
    offsets: dict[int, int]
    """Offsets of the views in the base, in elements, by number of the tensor."""


def find_bases(tensors: Sequence[torch.Tensor], names: Sequence[str]) -> list[Base]:
    """The bases to store, in order of the first tensor of each.

    Raises FormatError, with `names`, if tensors of different dtypes share memory.
    """
    bases: list[Base] = []
    for group in _sharing_groups(tensors):
        first = group[0]
        for number in group:
            if tensors[number].dtype != tensors[first].dtype:
                raise FormatError(
                    f"{names[number]} ({tensors[number].dtype}) shares memory with {names[first]} "
                    f"({tensors[first].dtype}): clone one of them"
                )
        owner = _find_owner(tensors, group)
        base = tensors[first if owner is None else owner]
        if owner is None:
            start, end = _extent(tensors, group)
            base = base.as_strided((end - start,), (1,), start)
        start = int(base.storage_offset())
        offsets = {number: int(tensors[number].storage_offset()) - start for number in group}
        bases.append(Base(base, owner, offsets))
    return bases


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the elements fill their extent of memory, once each: contiguous, or permuted."""
    expected = 1
    for step, size in sorted(zip(stride, shape, strict=True)):
        if size > 1:
            if step != expected:
                return False
            expected *= size
    return True


def extent(shape: Sequence[int], stride: Sequence[int]) -> int:
    """The number of elements of memory from a tensor's first element to its last."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def unexpanded(tensor: torch.Tensor, stride: Sequence[int] | None = None) -> torch.Tensor:
    """The tensor with size 1 in each dimension whose stride is 0."""
    for dimension, step in enumerate(tensor.stride() if stride is None else stride):
        if step == 0 and tensor.size(dimension) > 1:
            tensor = tensor.narrow(dimension, 0, 1)
    return tensor


def _unexpanded_layout(tensor: torch.Tensor) -> tuple[torch.Size, tuple[int, ...]]:
    tensor = unexpanded(tensor)
    return tensor.shape, tensor.stride()


def _extent(tensors: Sequence[torch.Tensor], group: Sequence[int]) -> tuple[int, int]:
    """Start and end of tensors of one dtype in their storage, in elements."""
    start = min(int(tensors[number].storage_offset()) for number in group)
    return start, max(_end(tensors[number]) for number in group)


def _end(tensor: torch.Tensor) -> int:
    return int(tensor.storage_offset()) + extent(tensor.shape, tensor.stride())


def _byte_extent(tensor: torch.Tensor) -> tuple[int, int]:
    return int(tensor.storage_offset()) * tensor.itemsize, _end(tensor) * tensor.itemsize


def _find_owner(tensors: Sequence[torch.Tensor], group: Sequence[int]) -> int | None:
    """The tensor of a group that contains all others; a contiguous one, if possible."""

    def layout(number: int) -> tuple[object, ...]:
        tensor = tensors[number]
        return tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype

    if len(set(map(layout, group))) == 1:
        return None if may_overlap(*_unexpanded_layout(tensors[group[0]])) else group[0]
    extents = {number: _byte_extent(tensors[number]) for number in group}
    union = min(start for start, _ in extents.values()), max(end for _, end in extents.values())
    owners = [
        number
        for number in group
        if extents[number] == union and is_dense(tensors[number].shape, tensors[number].stride())
    ]
    return min(owners, key=lambda number: not tensors[number].is_contiguous(), default=None)


def _sharing_groups(tensors: Sequence[torch.Tensor]) -> list[list[int]]:
    """Groups of tensors, by number, that share memory, in order of their first members."""
    storages: dict[tuple[torch.device, int], list[int]] = {}
    groups: list[list[int]] = []
    for number, tensor in enumerate(tensors):
        if tensor.numel():
            storage = tensor.device, tensor.untyped_storage().data_ptr()
            storages.setdefault(storage, []).append(number)
        else:
            groups.append([number])
    for members in storages.values():
        extents = {number: _byte_extent(tensors[number]) for number in members}
        end = -1
        overlapping: list[list[int]] = []
        for number in sorted(members, key=extents.__getitem__):
            if extents[number][0] >= end:
                overlapping.append([])
            overlapping[-1].append(number)
            end = max(end, extents[number][1])
        for candidates in overlapping:
            groups += _split(tensors, sorted(candidates))
    return sorted(groups)


def _split(tensors: Sequence[torch.Tensor], group: list[int]) -> list[list[int]]:
    """Splits tensors whose extents in one storage overlap into groups that share memory."""
    if len(group) == 1 or _find_owner(tensors, group) is not None:
        return [group]
    unit = min(tensors[number].itemsize for number in group)
    extents = {number: _byte_extent(tensors[number]) for number in group}
    start = min(start for start, _ in extents.values())
    end = max(end for _, end in extents.values())
    users = torch.zeros(
        (end - start) // unit, dtype=torch.int32
    )  # per unit, the last tensor using it, from 1 on
    leaders = list(range(len(group)))
    for order, number in enumerate(group):
        tensor, (begin, stop) = tensors[number], extents[number]
        shape, stride = _unexpanded_layout(tensor)
        if may_overlap(shape, stride):
            own = users[(begin - start) // unit : (stop - start) // unit]
        else:
            units = tensor.itemsize // unit
            steps = (*(step * units for step in stride), 1)
            own = users.as_strided((*shape, units), steps, (begin - start) // unit)
        for other in torch.bincount(own.flatten()).nonzero().flatten().tolist():
            if other:
                old = leaders[other - 1]
                leaders = [leaders[order] if leader == old else leader for leader in leaders]
        own.fill_(order + 1)
    groups: dict[int, list[int]] = {}
    for order, number in enumerate(group):
        groups.setdefault(leaders[order], []).append(number)
    return list(groups.values())
