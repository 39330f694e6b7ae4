"""Which rank the others wait for: judged from given times, and in real runs."""

import logging
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness import distributed
from harness.config import Config
from harness.health import phases, stragglers
from harness.health.stragglers import SLOTS, WINDOW, Late, Pace, Times, late_rank
from harness.run import run_in_world
from harness.task import default_feeder, load_task
from harness.testing.pool import RankPool
from tests.support.helpers import log_text, records, tiny_config

EVEN = {rank: Times(0.1, 1.0, 2.0) for rank in range(4)}


@pytest.mark.parametrize(
    ("times", "late"),
    [
        ({}, None),
        ({2: Times(0.25, 1.0, 2.0)}, None),  # less than a tenth of the step
        ({2: Times(3.1, 1.0, 5.0)}, Late(2, 3.0, by_data=True)),
        ({2: Times(0.1, 4.0, 5.0)}, Late(2, 3.0, by_data=False)),
        ({1: Times(3.1, 1.0, 5.0), 2: Times(3.1, 2.0, 5.0)}, Late(2, 4.0, by_data=True)),
    ],
)
def test_the_slowest_is_late_if_the_others_wait(times: dict[int, Times], late: Late | None) -> None:
    found = late_rank(EVEN | times)
    if late is None:
        assert found is None
    else:
        assert found is not None and (found.rank, found.by_data) == (late.rank, late.by_data)
        assert found.seconds == pytest.approx(late.seconds)


class World:
    """Ranks that exchange their vectors in this process."""

    def __init__(self, size: int, monkeypatch: pytest.MonkeyPatch):
        self.notes: list[str] = []
        self.totals = [(0.0, 0.0, 0.0)] * size
        self.rank = 0
        world = SimpleNamespace(
            global_rank=lambda: self.rank,
            world_size=lambda: size,
            gather=lambda host: [f"node{rank}" for rank in range(size)],
        )
        monkeypatch.setattr(stragglers, "distributed", world)
        monkeypatch.setattr(stragglers, "_totals", lambda: self.totals[self.rank])
        self.step = 0
        phases.at_step(0)
        self.ranks = []
        for self.rank in range(size):
            self.ranks.append(Pace(self.notes.append))

    def take_step(self, times: dict[int, Times], steps: int = 1) -> None:
        """A step, and an exchange between steps, as evaluations make them."""
        for _ in range(steps):
            self.step += 1
            phases.at_step(self.step)
            for rank in range(len(self.ranks)):
                own = times.get(rank, Times(0.1, 1.0, 2.0))
                data, forward, step = self.totals[rank]
                self.totals[rank] = (data + own.data, forward + own.forward, step + own.step)
            self.exchange()
            self.exchange()

    def exchange(self) -> None:
        vectors = []
        for rank, pace in enumerate(self.ranks):
            self.rank = rank
            vectors.append(pace.contribute())
        sums = [sum(numbers) for numbers in zip(*vectors, strict=True)]
        for pace in self.ranks:
            pace.receive(sums)


def test_a_slow_rank_is_told_of_when_it_begins_and_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("harness"), "propagate", True)
    caplog.set_level("INFO")
    world = World(3, monkeypatch)
    slow = {1: Times(3.1, 1.0, 5.0), 0: Times(0.1, 1.0, 5.0), 2: Times(0.1, 1.0, 5.0)}
    world.take_step({}, 30)
    world.take_step(slow)  # once
    world.take_step({}, 30)
    assert world.notes == []
    world.take_step(slow, 10)
    assert world.notes == ["rank 1 on node1 is slow: the others wait 3 s a step for its data"]
    metrics = world.ranks[0].of_step(world.step)
    assert metrics == {
        "slowest_rank": 1,
        "step_time_min_s": pytest.approx(5),
        "step_time_mean_s": pytest.approx(5),
        "step_time_max_s": pytest.approx(5),
        "own_time_min_s": pytest.approx(1.1),
        "own_time_mean_s": pytest.approx(2.1),
        "own_time_max_s": pytest.approx(4.1),
    }
    world.take_step(slow, 30)
    assert len(world.notes) == 1
    world.take_step({}, WINDOW)
    assert world.notes[1:] == [""]
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "step 71: rank 1 on node1 is slow: in 10 of the last 20 steps the others have waited for "
        "it, by 3 s, for its data",
        "step 117: rank 1 on node1 is no longer slow",
    ]


def test_many_ranks_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vector does not grow with the world; what a rank tells covers the steps since its last
    turn."""
    world = World(2 * SLOTS + 5, monkeypatch)
    assert len(world.ranks[0].contribute()) == 3 * SLOTS
    world.take_step({100: Times(0.1, 9.0, 9.0)}, 3 * 10)
    assert world.notes == []
    assert world.ranks[0].of_step(29)["slowest_rank"] == 100
    world.take_step({100: Times(0.1, 9.0, 9.0)}, 3)
    assert world.notes == ["rank 100 on node100 is slow: the others wait 8 s a step in forward"]


def run_with_slow_rank(config: Config, seconds: float) -> None:
    """Rank 1's feeder sleeps in every step, before its forward."""

    def slow_feeder(engine: Any, batch: Any) -> Any:
        if distributed.global_rank() == 1:
            time.sleep(seconds)
        return default_feeder(engine, batch)

    def slow(config: Config) -> Any:
        task = load_task(config)
        task.feeder = slow_feeder
        return task

    run_in_world(config, None, slow)


@pytest.mark.parametrize("stage", [0, pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_slow_rank_in_a_run(two_ranks: RankPool, tmp_path: Path, stage: int) -> None:
    """At every stage, also where the other rank waits for it in its own forward."""
    threshold = {"stage3_param_persistence_threshold": 0}
    engine = {"ds_overrides": {"zero_optimization": threshold}} if stage == 3 else {}
    config = tiny_config(tmp_path, stage, run={"steps": 16}, engines={"net": engine})
    two_ranks.run(run_with_slow_rank, config, 0.05)
    assert "rank 1 on " in log_text(config) and " is slow: in 10 of the last " in log_text(config)
    last = records(config)[-1]
    assert last["slowest_rank"] == 1
    assert 0.05 < last["step_time_min_s"] <= last["step_time_mean_s"] <= last["step_time_max_s"]
