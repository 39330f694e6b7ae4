"""The arithmetic of how ZeRO lays parameters out in flat tensors and splits these over the ranks.

Two layouts (deepspeed/runtime/zero/):

- *partitions*, stages 1 and 2 (stage_1_and_2.py): the parameters of a group are end to end in one
  long tensor, padded at its end, which is cut into equal parts, one per rank;
- *shards*, stage 3 (partition_parameters.py, stage3.py): every parameter is padded and cut into
  equal parts, and a rank has its parts of a sub-group's parameters end to end.

All sizes and offsets are in elements. Nothing of harness, torch or DeepSpeed is imported.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

ALIGNMENT = 2
"""Elements that a partition is a multiple of (nccl_start_alignment_factor)."""
SUB_GROUP_SIZE = 1_000_000_000
"""DeepSpeed's default of sub_group_size: elements per rank that fill a sub-group at stage 3."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Elements [start, start + length) of a flattened parameter, from `offset` on in a flat tensor.

    Where a parameter has nothing in the flat tensor, `length` is 0.
    """

    name: str
    start: int
    offset: int
    length: int

    @property
    def stop(self) -> int:
        """The end of the stretch in the parameter."""
        return self.start + self.length

    @property
    def flat_slice(self) -> slice:
        """The stretch in the flat tensor."""
        return slice(self.offset, self.offset + self.length)


def full_segment(*, name: str, numel: int, offset: int = 0) -> Segment:
    """A parameter that is complete in a flat tensor."""
    return Segment(name=name, start=0, offset=offset, length=numel)


def offsets_end_to_end(
    *, sizes: Mapping[str, int], gaps: Sequence[int] | None = None
) -> dict[str, int]:
    """The offset of each parameter if they are end to end, each followed by its gap."""
    offsets, end = {}, 0
    for (name, size), gap in zip(sizes.items(), gaps or [0] * len(sizes), strict=True):
        offsets[name] = end
        end += size + gap
    return offsets


def full_segments(*, sizes: Mapping[str, int]) -> list[Segment]:
    """Complete parameters end to end in one flat tensor."""
    offsets = offsets_end_to_end(sizes=sizes)
    return [full_segment(name=n, numel=size, offset=offsets[n]) for n, size in sizes.items()]


def partition_size(*, numel: int, world: int) -> int:
    """Elements of each rank's partition of a group with `numel` elements, padding included."""
    return math.ceil(numel / (ALIGNMENT * world)) * ALIGNMENT


def partition_padding(*, numel: int, size: int, rank: int) -> int:
    """Elements at the end of a rank's partition of `size` that belong to no parameter."""
    return min(max((rank + 1) * size - numel, 0), size)


def partition_segments(
    *, offsets: Mapping[str, int], sizes: Mapping[str, int], size: int, rank: int
) -> list[Segment]:
    """What a rank's partition of `size` holds: a segment for every parameter, in that order.

    `offsets`: of the parameters in the long tensor, as from `offsets_end_to_end`.
    """
    begin = rank * size
    segments = []
    for name, offset in offsets.items():
        start = min(max(begin - offset, 0), sizes[name])
        stop = min(max(begin + size - offset, 0), sizes[name])
        in_partition = offset + start - begin
        segments.append(Segment(name=name, start=start, offset=in_partition, length=stop - start))
    return segments


def shard_size(*, numel: int, world: int) -> int:
    """Elements of each rank's shard of a parameter, padding included."""
    return math.ceil(numel / world)


def shard_range(*, numel: int, size: int, rank: int) -> tuple[int, int]:
    """The elements [start, stop) of a parameter that are in a rank's shard of `size`."""
    return min(rank * size, numel), min((rank + 1) * size, numel)


def shard_segments(*, sizes: Mapping[str, int], world: int, rank: int) -> list[Segment]:
    """What a rank's flat tensor of shards holds: a segment for every parameter, in that order."""
    segments, offset = [], 0
    for name, numel in sizes.items():
        size = shard_size(numel=numel, world=world)
        start, stop = shard_range(numel=numel, size=size, rank=rank)
        segments.append(Segment(name=name, start=start, offset=offset, length=stop - start))
        offset += size
    return segments


def shards_numel(*, sizes: Mapping[str, int], world: int) -> int:
    """Elements of a rank's flat tensor of shards, padding included."""
    return sum(shard_size(numel=numel, world=world) for numel in sizes.values())


def sub_groups(
    *, sizes: Mapping[str, int], world: int, limit: int = SUB_GROUP_SIZE
) -> Iterator[list[str]]:
    """The parameters of a group in sub-groups, each full at `limit` elements per rank."""
    names: list[str] = []
    filled = 0
    for name, numel in sizes.items():
        names.append(name)
        filled += shard_size(numel=numel, world=world)
        if filled >= limit:
            yield names
            names, filled = [], 0
    if names:
        yield names


def round_robin_order(items: Sequence[T], *, world: int) -> list[T]:
    """The order in which round_robin_gradients puts the parameters of a group: dealt out to the
    ranks in turn, then rank by rank."""
    return [item for rank in range(world) for item in items[rank::world]]
