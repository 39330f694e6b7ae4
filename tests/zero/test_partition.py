"""The arithmetic of ZeRO's partitions and shards.

Real ranks compare it with DeepSpeed in tests/optim/apollo/test_zero.py and tests/convert.
"""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.zero.partition import (
    Segment,
    offsets_end_to_end,
    partition_padding,
    partition_segments,
    partition_size,
    round_robin_order,
    shard_segments,
    shard_size,
    shards_numel,
    sub_groups,
)

numels = st.lists(st.integers(1, 40), min_size=1, max_size=6).map(
    lambda sizes: {f"p{number}": size for number, size in enumerate(sizes)}
)
worlds = st.integers(1, 6)


def check_cover(by_rank: list[list[Segment]], sizes: dict[str, int], size: int) -> None:
    """Every element of every parameter is in one place, in order and without overlap."""
    for name, numel in sizes.items():
        elements = [
            e for own in by_rank for s in own if s.name == name for e in range(s.start, s.stop)
        ]
        assert elements == list(range(numel))
    for own in by_rank:
        assert [segment.name for segment in own] == list(sizes)
        end = 0
        for segment in own:
            if segment.length:
                assert end <= segment.flat_slice.start < segment.flat_slice.stop <= size
                end = segment.flat_slice.stop


@given(numels, worlds)
def test_partitions_hold_everything_once(sizes: dict[str, int], world: int) -> None:
    total = sum(sizes.values())
    size = partition_size(numel=total, world=world)
    offsets = offsets_end_to_end(sizes=sizes)
    by_rank = [
        partition_segments(offsets=offsets, sizes=sizes, size=size, rank=rank)
        for rank in range(world)
    ]
    check_cover(by_rank, sizes, size)
    padding = [partition_padding(numel=total, size=size, rank=rank) for rank in range(world)]
    assert [sum(s.length for s in own) for own in by_rank] == [size - pad for pad in padding]


@given(numels, worlds)
def test_shards_hold_everything_once(sizes: dict[str, int], world: int) -> None:
    size = shards_numel(sizes=sizes, world=world)
    check_cover(
        [shard_segments(sizes=sizes, world=world, rank=rank) for rank in range(world)], sizes, size
    )


@given(numels, worlds, st.integers(1, 60))
def test_sub_groups_are_full_but_for_the_last(
    sizes: dict[str, int], world: int, limit: int
) -> None:
    groups = list(sub_groups(sizes=sizes, world=world, limit=limit))
    assert [name for names in groups for name in names] == list(sizes)
    for names in groups[:-1]:
        filled = [shard_size(numel=sizes[name], world=world) for name in names]
        assert sum(filled) >= limit > sum(filled[:-1])


def test_known_layouts() -> None:
    sizes = {"a": 5, "b": 3}
    offsets = offsets_end_to_end(sizes=sizes, gaps=[1, 0])
    assert offsets == {"a": 0, "b": 6}
    assert partition_segments(offsets=offsets, sizes=sizes, size=4, rank=1) == [
        Segment(name="a", start=4, offset=0, length=1),
        Segment(name="b", start=0, offset=2, length=2),
    ]
    assert shard_segments(sizes=sizes, world=2, rank=1) == [
        Segment(name="a", start=3, offset=0, length=2),
        Segment(name="b", start=2, offset=3, length=1),
    ]
    assert partition_size(numel=9, world=2) == 6
    assert round_robin_order("abcde", world=2) == list("acebd")


def test_positions_are_given_by_name() -> None:
    with pytest.raises(TypeError):
        Segment("a", 0, 0, 1)  # type: ignore[misc]


def test_nothing_else_is_imported() -> None:
    code = (
        "import sys; import harness.zero.partition; print(sorted(n for n in sys.modules "
        "if n in ('torch', 'deepspeed') or n.startswith('harness.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['harness.zero', 'harness.zero.partition']"
