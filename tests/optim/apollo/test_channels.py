"""ChannelPlan: every element is in one tile and every channel on one rank, however ZeRO cuts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.optim.apollo.channels import ChannelPlan, Matrix, matrices_of
from harness.zero.partition import offsets_end_to_end, partition_segments, shard_segments
from harness.zero.shards import Shard

Shapes = list[tuple[int, ...]]


def numels(shapes: Shapes) -> dict[str, int]:
    return {str(number): torch.Size(shape).numel() for number, shape in enumerate(shapes)}


def laid_end_to_end(shapes: Shapes, world: int, gap: int) -> list[Shard]:
    """ZeRO-1/2: parameters one after the other, cut into equal parts; every rank's shard."""
    sizes = numels(shapes)
    offsets = offsets_end_to_end(sizes=sizes, gaps=[gap] * len(shapes))
    size = -(-(sum(sizes.values()) + gap * len(shapes)) // world)
    per_rank = tuple(
        tuple(partition_segments(offsets=offsets, sizes=sizes, size=size, rank=rank))
        for rank in range(world)
    )
    return [Shard(per_rank, rank) for rank in range(world)]


def each_cut(shapes: Shapes, world: int) -> list[Shard]:
    """ZeRO-3: every parameter cut into equal parts; every rank's shard."""
    per_rank = tuple(
        tuple(shard_segments(sizes=numels(shapes), world=world, rank=rank)) for rank in range(world)
    )
    return [Shard(per_rank, rank) for rank in range(world)]


sides = st.tuples(st.integers(1, 9), st.integers(1, 9))


@settings(max_examples=300, deadline=None)
@given(st.lists(sides, min_size=1, max_size=5), st.integers(1, 5), st.integers(-1, 3))
def test_every_element_and_every_channel_once(shapes: Shapes, world: int, gap: int) -> None:
    shards = each_cut(shapes, world) if gap < 0 else laid_end_to_end(shapes, world, gap)
    matrices = {str(n): matrices_of(str(n), shape, False) for n, shape in enumerate(shapes)}
    plans = [ChannelPlan([shard], matrices) for shard in shards]
    seen = [torch.zeros(shape) for shape in shapes]
    owned: dict[tuple[int, int], int] = {}
    holders = [
        sum(segments[number].length > 0 for segments in shards[0].segments)
        for number in range(len(shapes))
    ]
    for plan, shard in zip(plans, shards, strict=True):
        assert plan.shared == plans[0].shared
        assert plan.is_cut == (max(holders) > 1)
        assert len(plan.matrix_of_slot) == plan.slots
        for tile in plan.tiles:
            matrix = plan.matrices[tile.matrix]
            segment = shard.own[tile.matrix]
            first = tile.offset - segment.offset + segment.start
            assert first - segment.start >= 0
            size = len(tile.channels) * len(tile.inner)
            assert first - segment.start <= segment.length - size
            row, column = divmod(first, matrix.columns)
            sides = (tile.channels, tile.inner)
            rows, columns = sides if matrix.by_rows else sides[::-1]
            assert (rows.start, columns.start) == (row, column)
            assert tile.strides == ((len(columns), 1) if matrix.by_rows else (1, len(columns)))
            seen[tile.matrix][rows.start : rows.stop, columns.start : columns.stop] += 1
            slots = range(tile.slots.start, tile.slots.stop)
            for channel, slot in zip(tile.channels, slots, strict=True):
                assert slot_of(plan, tile.matrix, channel) == slot
        for row, channels in plan.owned():
            for ahead in range(channels.count):
                assert row + ahead < plan.rows
                place = channels.matrix, channels.channel + ahead
                assert place not in owned
                owned[place] = 1
    assert all(elements.eq(1).all() for elements in seen)
    assert len(owned) == sum(max(shape) for shape in shapes)


def slot_of(plan: ChannelPlan, matrix: int, channel: int) -> int:
    slot = 0
    for first, ranges in ((0, plan.local), (plan.local_rows, plan.shared)):
        slot = first
        for channels in ranges:
            ahead = channel - channels.channel
            if channels.matrix == matrix and 0 <= ahead < channels.count:
                return slot + ahead
            slot += channels.count
    raise AssertionError("no slot")


def test_tall_matrices_share_only_the_rows_that_are_cut() -> None:
    shards = each_cut([(100, 7)], 4)
    plans = [ChannelPlan([shard], {"0": [Matrix("0", 0, 100, 7)]}) for shard in shards]
    assert [plan.local_rows for plan in plans] == [25, 25, 25, 25]
    shards = each_cut([(101, 7)], 4)  # 177 elements each, and 177 is no multiple of 7
    plans = [ChannelPlan([shard], {"0": [Matrix("0", 0, 101, 7)]}) for shard in shards]
    assert [len(plan.shared) for plan in plans] == [3] * 4
    assert sum(plan.local_rows for plan in plans) == 101 - 3


def test_the_matrices_of_a_parameter() -> None:
    assert matrices_of("conv", (8, 3, 5, 5), False) == [Matrix("conv", 0, 8, 75)]
    assert matrices_of("experts", (2, 4, 3), True) == [
        Matrix("experts[0]", 0, 4, 3),
        Matrix("experts[1]", 12, 4, 3),
    ]
    for shape, stacked in (((7,), False), ((7, 3), True), ((0, 3), False)):
        with pytest.raises(ValueError, match=r"'odd' of shape .* is not a matrix"):
            matrices_of("odd", shape, stacked)
