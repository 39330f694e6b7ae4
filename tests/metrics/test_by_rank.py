"""What is recorded of how much the ranks differ."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pytest

from harness.health.phases import Phase
from harness.health.stragglers import Times
from harness.metrics import by_rank
from harness.metrics.by_rank import ByRank


class Told:
    """Two ranks' numbers: in a run they come from the vector."""

    def tell(self, numbers: Sequence[float]) -> Sequence[float]:
        return numbers

    def hear(self, sums: Sequence[float]) -> Any:
        return [sums[: len(sums) // 2], sums[len(sums) // 2 :]] if sums else []


class Clock:
    """The clock of rank 0."""

    def __init__(self, unseen: Collection[Phase] = ()):
        self.waits_unseen = lambda: unseen
        self.alone, self.seconds = lambda: [0.0] * 4, lambda: 0.0


def hear(
    ranks: ByRank, first: list[float], second: list[float], memory: Mapping[str, int], clock: Clock
) -> dict[str, float]:
    """What is heard of data, forward, backward, optimizer, step and memory of two ranks."""
    ranks.tell(clock, memory)  # pyright: ignore[reportArgumentType]
    return ranks.hear([*first, *second])


def test_phases_that_differ_and_each_sample_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_rank, "RankNumbers", Told)
    ranks, memory = ByRank(), {"host_memory_bytes": 1, "device_memory_peak_bytes": 2}
    numbers = [1.0, 2.0, 4.0, 1.0, 10.0, 100, 7], [1.0, 2.5, 6.0, 1.0, 10.0, 300, 5]
    found = hear(ranks, *numbers, memory, Clock())
    assert found == {
        "slowest_rank": 1,
        "step_time_min_s": 10,
        "step_time_mean_s": 10,
        "step_time_max_s": 10,
        "own_time_min_s": 8,
        "own_time_mean_s": 9.25,
        "own_time_max_s": 10.5,
        "own_backward_time_min_s": 4,
        "own_backward_time_mean_s": 5,
        "own_backward_time_max_s": 6,
        "own_backward_time_max_rank": 1,
        "host_memory_min_bytes": 100,
        "host_memory_mean_bytes": 200,
        "host_memory_max_bytes": 300,
        "host_memory_max_rank": 1,
        "device_memory_peak_min_bytes": 5,
        "device_memory_peak_mean_bytes": 6,
        "device_memory_peak_max_bytes": 7,
        "device_memory_peak_max_rank": 0,
    }
    assert not [name for name in hear(ranks, *numbers, memory, Clock()) if "memory" in name]
    assert hear(ranks, [], [], dict(memory), Clock()) == {}  # in a round that has not ended
    assert "host_memory_max_rank" in hear(ranks, *numbers, memory, Clock())


def test_what_a_gpu_does_in_a_phase_with_collectives_blames_no_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(by_rank, "RankNumbers", Told)
    ranks = ByRank()
    found = hear(ranks, [5.0, 2, 2, 0, 9], [1.0, 2, 9, 0, 9], {}, Clock({"backward", "step"}))
    assert ranks.times == [Times(5, 2, 0, 0, 9), Times(1, 2, 0, 0, 9)]
    assert (found["slowest_rank"], found["own_time_max_s"]) == (0, 7)
    assert (found["own_data_time_max_rank"], found["backward_time_max_rank"]) == (0, 1)
    assert "own_backward_time_max_s" not in found
