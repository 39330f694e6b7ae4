"""The tensors that DeepSpeed has an optimizer step, computed from shapes."""

from collections.abc import Iterator, Mapping, Sequence
from math import prod

from harness.zero.partition import (
    full_segment,
    offsets_end_to_end,
    partition_segments,
    partition_size,
    shard_segments,
    shards_numel,
)
from harness.zero.shards import Shard

Shapes = Mapping[str, Sequence[int]]


def expected_shards(
    shapes: Shapes, stage: int, world: int, rank: int
) -> Iterator[tuple[Shard, int]]:
    """The tensors that a rank steps for one parameter group: (shard, number of elements).

    Exact for DeepSpeed's default layout (at stage 3 except for the padding of several sub-groups).
    """
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    if stage == 0:
        for name, size in sizes.items():
            yield Shard(((full_segment(name=name, numel=size),),)), size
        return
    if stage == 3:
        by_rank = [shard_segments(sizes=sizes, world=world, rank=of) for of in range(world)]
        elements = shards_numel(sizes=sizes, world=world)
    else:
        offsets = offsets_end_to_end(sizes=sizes)
        elements = partition_size(numel=sum(sizes.values()), world=world)
        by_rank = [
            partition_segments(offsets=offsets, sizes=sizes, size=elements, rank=of)
            for of in range(world)
        ]
    yield Shard(tuple(map(tuple, by_rank)), rank), elements
