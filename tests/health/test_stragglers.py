"""Which rank the others wait for: judged from given times, and in real runs."""

import logging
import time
from pathlib import Path
from statistics import mode
from typing import Any

import pytest

from harness import distributed
from harness.config import Config
from harness.health import stragglers
from harness.health.stragglers import WINDOW, Late, Pace, Times, late_rank
from harness.metrics.step_clock import NAMES
from harness.run import run_in_world
from harness.task import default_feeder, load_task
from harness.testing.pool import RankPool
from tests.support.helpers import Pools, log_text, records, tiny_config
from tests.support.quick import quick

EVEN = [Times(0.1, 1.0, 2.0, 0.5, 4.0)] * 4


def but(*changed: tuple[int, Times], of: int = 4) -> list[Times]:
    """Even times, but those of some ranks."""
    return [dict(changed).get(rank, EVEN[0]) for rank in range(of)]


@pytest.mark.parametrize(
    ("times", "late"),
    [
        (EVEN, None),
        (but((2, EVEN[0]._replace(data=0.45))), None),  # less than a tenth of the step
        (but((2, EVEN[0]._replace(data=3.1))), Late(2, 3.0, "data")),
        (but((2, EVEN[0]._replace(forward=4.0))), Late(2, 3.0, "forward")),
        (but((2, EVEN[0]._replace(backward=4.0))), Late(2, 2.0, "backward")),
        (but((2, EVEN[0]._replace(optimizer=4.0))), Late(2, 3.5, "step")),
        (
            but((1, EVEN[0]._replace(data=3.1)), (2, EVEN[0]._replace(data=3.1, forward=2.0))),
            Late(2, 4.0, "data"),
        ),
    ],
)
def test_the_slowest_is_late_if_the_others_wait(times: list[Times], late: Late | None) -> None:
    found = late_rank(times)
    if late is None:
        assert found is None
    else:
        assert found is not None and (found.rank, found.phase) == (late.rank, late.phase)
        assert found.seconds == pytest.approx(late.seconds)


def test_a_slow_rank_is_told_of_when_it_begins_and_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("harness"), "propagate", True)
    monkeypatch.setattr(
        stragglers.distributed, "gather", lambda host: [f"node{rank}" for rank in range(3)]
    )
    caplog.set_level("INFO")
    notes: list[str] = []
    pace, step = Pace(notes.append), 0
    even, slow = but(of=3), but((1, EVEN[0]._replace(data=3.1)), of=3)

    def judge(times: list[Times], rounds: int = 1) -> None:
        nonlocal step
        for _ in range(rounds):
            step += 1
            pace.judge(step, times)
            pace.judge(step, [])  # of a step that has ended no round

    judge(even, 30)
    judge(slow)  # once
    judge(even, 30)
    assert notes == []
    judge(slow, 10)
    assert notes == ["rank 1 on node1 is slow: the others wait 3 s a step for its data"]
    judge(slow, 30)
    assert len(notes) == 1
    judge(even, WINDOW)
    assert notes[1:] == [""]
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "step 71: rank 1 on node1 is slow: in 10 of the last 20 steps the others have waited for "
        "it, by 3 s, for its data",
        "step 117: rank 1 on node1 is no longer slow",
    ]


def run_with_slow_rank(
    config: Config, phase: str, seconds: float, is_weighed: bool = False
) -> None:
    """Rank 1 sleeps in every step: as it collates, before its forward, as its loss is
    back-propagated, or before its optimizer's step."""
    is_slow = distributed.global_rank() == 1

    def sleep(*_: Any) -> None:
        time.sleep(seconds)

    def slow(config: Config) -> Any:
        task = load_task(config)
        collate = task.collate
        if is_weighed:
            task.weigh = len

        def slow_collate(samples: Any) -> Any:
            sleep()
            return collate(samples)

        def slow_feeder(engine: Any, batch: Any) -> Any:
            if phase == "forward":
                sleep()
            if phase == "step":
                base = engine.ds.optimizer
                base = getattr(base, "optimizer", base)
                if not base._optimizer_step_pre_hooks:
                    base.register_step_pre_hook(sleep)
            loss, stats = default_feeder(engine, batch)
            if phase == "backward" and loss.requires_grad:
                loss.register_hook(sleep)
            return loss, stats

        if is_slow:
            task.feeder = slow_feeder
            if phase == "data":
                task.collate = slow_collate
        return task

    run_in_world(config, None, slow)


@pytest.mark.parametrize(
    ("phase", "stage", "ranks"),
    quick(
        [
            (phase, stage, ranks)
            for phase in stragglers.WHERE
            for stage in (0, 1, 2, 3)
            for ranks in (2, 3)
        ],
        *(("data", 0, 2), ("forward", 3, 2), ("backward", 2, 3)),
    ),
)
def test_a_slow_rank_in_a_run(
    pools: Pools, tmp_path: Path, phase: Any, stage: int, ranks: int
) -> None:
    """In every phase, at every stage, wherever the others wait for it."""
    threshold = {"stage3_param_persistence_threshold": 0}
    engine = {"ds_overrides": {"zero_optimization": threshold}} if stage == 3 else {}
    config = tiny_config(tmp_path, stage, run={"steps": 20}, engines={"net": engine})
    pools(ranks).run(run_with_slow_rank, config, phase, 0.05)
    log = log_text(config)
    assert "rank 1 on " in log and " is slow: in 10 of the last " in log
    assert f" s, {stragglers.WHERE[phase]}\n" in log
    found, name = records(config), f"own_{NAMES[phase]}"
    for key in ("slowest_rank", f"{name}_max_rank"):
        assert mode(record.get(key) for record in found) == 1
    for record in found:
        assert record["step_time_min_s"] <= record["step_time_mean_s"] <= record["step_time_max_s"]
        if record.get(f"{name}_max_rank") == 1:
            assert record[f"{name}_min_s"] < record[f"{name}_mean_s"] < record[f"{name}_max_s"]
            assert record[f"{name}_max_s"] > 0.05
    assert found[0]["host_memory_max_rank"] in range(ranks)


@pytest.mark.slow
def test_a_rank_whose_data_are_slow_where_batches_are_weighed(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    """They are fetched before it is known what their step weighs, and are in the step's time."""
    config = tiny_config(tmp_path, run={"steps": 20})
    two_ranks.run(run_with_slow_rank, config, "data", 0.05, True)
    assert f" s, {stragglers.WHERE['data']}\n" in log_text(config)
    found = records(config)[:-2]  # for the last two steps nothing is fetched
    assert mode(record.get("own_data_time_max_rank") for record in found) == 1
    assert min(record["step_time_max_s"] for record in found) > 0.05
