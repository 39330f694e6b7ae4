"""Bytes of state that APOLLO keeps on each rank, computed from shapes."""

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

from harness.optim.apollo.channels import ChannelPlan, matrices_of
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


def state_bytes(groups: Sequence[Mapping[str, Any]], stage: int, world: int) -> list[int]:
    """Bytes of optimizer state per rank for the groups that `apollo_param_groups` returns.

    Exact for DeepSpeed's default layout (at stage 3 except for the padding of several sub-groups).
    Parameters may be on the meta device; one integer per channel is allocated.
    """
    total = [0] * world
    for group in groups:
        shapes = {
            name: tuple(parameter.shape)
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
        }
        matrices = {}
        if group["rank"]:
            for name, shape in shapes.items():
                matrices[name] = matrices_of(name, shape, group.get("stacked", False))
        for rank in range(world):
            for shard, elements in _shards(shapes, stage, world, rank):
                total[rank] += 4  # the step
                if not group["rank"]:
                    total[rank] += 2 * 4 * elements
                else:
                    plan = ChannelPlan([shard], matrices)
                    total[rank] += 2 * 4 * plan.rows * group["rank"] + 4 * len(plan.matrices)
                    if group.get("projection") == "svd":
                        rows = sum(size for _, size in plan.projection_rows.values())
                        total[rank] += 4 * rows * group["rank"]
    return total


def _shards(shapes: Shapes, stage: int, world: int, rank: int) -> Iterator[tuple[Shard, int]]:
    """The tensors that a rank steps for one parameter group: (shard, number of elements)."""
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
