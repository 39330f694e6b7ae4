"""The plan of channels: everything is somewhere, once, however ZeRO cuts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.optim.apollo.channels import ChannelPlan, Matrix, matrices_of
from harness.zero.partition import end_to_end, partition_segments, shard_segments
from harness.zero.shards import Shard

Shapes = list[tuple[int, ...]]


def numels(shapes: Shapes) -> dict[str, int]:
    return {str(number): torch.Size(shape).numel() for number, shape in enumerate(shapes)}


def laid_end_to_end(shapes: Shapes, world: int, gap: int) -> list[Shard]:
    """ZeRO-1/2: parameters one after the other, cut into equal parts; every rank's shard."""
    sizes = numels(shapes)
    places = end_to_end(sizes=sizes, gaps=[gap] * len(shapes))
    size = -(-(sum(sizes.values()) + gap * len(shapes)) // world)
    per_rank = tuple(
        tuple(partition_segments(places=places, sizes=sizes, size=size, rank=rank))
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
    kept: dict[tuple[int, int], int] = {}
    holders = [
        sum(segments[number].length > 0 for segments in shards[0].segments)
        for number in range(len(shapes))
    ]
    for plan, shard in zip(plans, shards, strict=True):
        assert plan.shared == plans[0].shared
        assert plan.is_cut == (max(holders) > 1)
        assert len(plan.matrix_of_slot) == plan.slots
        for block in plan.blocks:
            matrix = plan.matrices[block.matrix]
            piece = shard.own[block.matrix]
            first = block.offset - piece.offset + piece.start
            assert first - piece.start >= 0
            size = len(block.channels) * len(block.inner)
            assert first - piece.start <= piece.length - size
            row, column = divmod(first, matrix.columns)
            here = (block.channels, block.inner)
            rows, columns = here if matrix.by_rows else here[::-1]
            assert (rows.start, columns.start) == (row, column)
            assert block.strides == ((len(columns), 1) if matrix.by_rows else (1, len(columns)))
            seen[block.matrix][rows.start : rows.stop, columns.start : columns.stop] += 1
            slots = range(block.slots.start, block.slots.stop)
            for channel, slot in zip(block.channels, slots, strict=True):
                assert slot_of(plan, block.matrix, channel) == slot
        for row, run in plan.owned():
            for ahead in range(run.count):
                assert row + ahead < plan.rows
                place = run.matrix, run.channel + ahead
                assert place not in kept
                kept[place] = 1
    assert all(elements.eq(1).all() for elements in seen)
    assert len(kept) == sum(max(shape) for shape in shapes)


def slot_of(plan: ChannelPlan, matrix: int, channel: int) -> int:
    slot = 0
    for first, runs in ((0, plan.local), (plan.rows_here, plan.shared)):
        slot = first
        for run in runs:
            if run.matrix == matrix and run.channel <= channel < run.channel + run.count:
                return slot + channel - run.channel
            slot += run.count
    raise AssertionError("no slot")


def test_tall_matrices_share_only_the_rows_that_are_cut() -> None:
    shards = each_cut([(100, 7)], 4)
    plans = [ChannelPlan([shard], {"0": [Matrix("0", 0, 100, 7)]}) for shard in shards]
    assert [plan.rows_here for plan in plans] == [25, 25, 25, 25]
    shards = each_cut([(101, 7)], 4)  # 177 elements each, and 177 is no multiple of 7
    plans = [ChannelPlan([shard], {"0": [Matrix("0", 0, 101, 7)]}) for shard in shards]
    assert [len(plan.shared) for plan in plans] == [3] * 4
    assert sum(plan.rows_here for plan in plans) == 101 - 3


def test_the_matrices_of_a_parameter() -> None:
    assert matrices_of("conv", (8, 3, 5, 5), False) == [Matrix("conv", 0, 8, 75)]
    assert matrices_of("experts", (2, 4, 3), True) == [
        Matrix("experts[0]", 0, 4, 3),
        Matrix("experts[1]", 12, 4, 3),
    ]
    for shape, stacked in (((7,), False), ((7, 3), True), ((0, 3), False)):
        with pytest.raises(ValueError, match=r"'odd' of shape .* is no matrix"):
            matrices_of("odd", shape, stacked)
