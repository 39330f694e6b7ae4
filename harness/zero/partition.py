"""How ZeRO lays parameters out in flat tensors and cuts these among the ranks: the arithmetic.

Two layouts (deepspeed/runtime/zero/):

- *partitions*, stages 1 and 2 (stage_1_and_2.py): the parameters of a group are end to end in one
  long tensor, padded at its end, which is cut into equal parts, one a rank;
- *shards*, stage 3 (partition_parameters.py, stage3.py): every parameter is padded and cut into
  equal parts, and a rank has its parts of a sub-group's parameters end to end.

Everything is counted in elements. Nothing of harness, torch or DeepSpeed is imported.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

ALIGNMENT = 2
"""Elements that a partition is a multiple of (nccl_start_alignment_factor)."""
SUB_GROUP_SIZE = 1_000_000_000
"""DeepSpeed's default of sub_group_size: elements of a rank that fill a sub-group at stage 3."""


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
    def place(self) -> slice:
        """The stretch of the flat tensor."""
        return slice(self.offset, self.offset + self.length)


def full_segment(*, name: str, numel: int, offset: int = 0) -> Segment:
    """A parameter that is complete in a flat tensor."""
    return Segment(name=name, start=0, offset=offset, length=numel)


def end_to_end(*, sizes: Mapping[str, int], gaps: Sequence[int] | None = None) -> dict[str, int]:
    """Where each parameter begins if they follow each other, each with a gap behind it."""
    places, end = {}, 0
    for (name, size), gap in zip(sizes.items(), gaps or [0] * len(sizes), strict=True):
        places[name] = end
        end += size + gap
    return places


def full_segments(*, sizes: Mapping[str, int]) -> list[Segment]:
    """Complete parameters end to end in one flat tensor."""
    places = end_to_end(sizes=sizes)
    return [full_segment(name=n, numel=size, offset=places[n]) for n, size in sizes.items()]


def partition_size(*, numel: int, world: int) -> int:
    """Elements of each rank's partition of a group with `numel` elements, padding included."""
    return math.ceil(numel / (ALIGNMENT * world)) * ALIGNMENT


def partition_padding(*, numel: int, size: int, rank: int) -> int:
    """Elements at the end of a rank's partition of `size` that belong to no parameter."""
    return min(max((rank + 1) * size - numel, 0), size)


def partition_segments(
    *, places: Mapping[str, int], sizes: Mapping[str, int], size: int, rank: int
) -> list[Segment]:
    """What a rank's partition of `size` holds: a segment for every parameter, in that order.

    `places`: where the parameters begin in the long tensor, as of `end_to_end`.
    """
    begin = rank * size
    segments = []
    for name, place in places.items():
        start = min(max(begin - place, 0), sizes[name])
        stop = min(max(begin + size - place, 0), sizes[name])
        offset = place + start - begin
        segments.append(Segment(name=name, start=start, offset=offset, length=stop - start))
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
    """The parameters of a group in sub-groups, which are full with `limit` elements of a rank."""
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
    """The order that round_robin_gradients gives the parameters of a group: dealt out to the
    ranks, and then one rank's after another's."""
    return [item for rank in range(world) for item in items[rank::world]]
