"""Runs that end with an error: no record is lost, and what all ranks have trained is saved."""

import asyncio
import os
import pkgutil
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import default_collate

from harness import distributed
from harness.checkpoint import save
from harness.config import Config
from harness.convert.run_checkpoints import checkpoints_in
from harness.engine import engines
from harness.health.outcome import Outcome
from harness.run import run_in_world
from harness.task import Task, load_task
from harness.testing.pool import RankError, RankPool
from tests.support.helpers import (
    ROOT,
    Pools,
    checkpoint,
    error_of,
    exports,
    log_text,
    losses,
    records,
    tiny_config,
    without_times,
)
from tests.support.quick import quick

PLACES = {
    "feed": "harness.engine.engines.feed",
    "data": "harness.data.loader.Loader.__next__",
    "step": "harness.engine.engine.engine_state.take_step",
}
"""What is called once in each micro-batch, or at its optimizer step."""


class Unwell(Exception):
    """Not a HarnessError."""


@contextmanager
def failing(
    place: str, at: int, how: Callable[[], object] | None = None, raises: bool = True
) -> Iterator[None]:
    """The `at`-th call of one of the `PLACES` does `how` and fails, after all that it does."""
    path, calls = PLACES[place], 0
    with pytest.MonkeyPatch.context() as patch:
        original = pkgutil.resolve_name(path)

        def faulty(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if place == "data" and calls == at:
                fail(how, raises)
            result = original(*args)
            if calls == at:
                fail(how, raises)
            return result

        patch.setattr(path, faulty)
        yield


def fail(how: Callable[[], object] | None, raises: bool) -> None:
    if how is not None:
        how()
    if raises:
        raise Unwell("it is unwell")


def die() -> None:
    os._exit(7)


def run_failing(config: Config, place: str, at: int, ranks: tuple[int, ...]) -> None:
    """A run that fails on some ranks, or on all of them together."""
    if distributed.global_rank() not in ranks:
        run_in_world(config)
        return
    with failing(place, at), pytest.raises(Unwell):
        run_in_world(config)


def accumulated(directory: Path, stage: int = 0, **overrides: Any) -> Config:
    """Six steps of two micro-batches, with dropout."""
    engine = {"ds_overrides": {"gradient_accumulation_steps": 2}}
    task = {"args": {"dropout": 0.3}}
    return tiny_config(directory, stage, engines={"net": engine}, task=task, **overrides)


def steps_saved(config: Config) -> list[int]:
    return [int(path.name[-8:]) for path in checkpoints_in(config.run_dir / "checkpoints")]


@pytest.mark.parametrize(
    ("ranks", "stage", "place", "at"),
    quick(
        [
            (1, 0, "feed", 8),
            (2, 0, "data", 7),
            (2, 1, "feed", 8),
            (2, 2, "data", 8),
            (2, 3, "feed", 7),
            (3, 3, "feed", 8),
        ],
        (1, 0, "feed", 8),
        (2, 2, "data", 8),
        (3, 3, "feed", 8),
    ),
)
def test_what_fails_on_all_ranks_is_saved_as_before_the_step(
    pools: Pools, tmp_path: Path, ranks: int, stage: int, place: str, at: int
) -> None:
    """In micro-batch `at`, one of step 4; the run resumes as if nothing had happened."""
    config, whole = accumulated(tmp_path / "a", stage), accumulated(tmp_path / "b", stage)
    pools(ranks).run(run_failing, config, place, at, tuple(range(ranks)))
    assert [record["step"] for record in records(config)] == [1, 2, 3]
    assert steps_saved(config) == [3]
    assert "Unwell: it is unwell\nsaving a checkpoint" in log_text(config)
    ended = Outcome.read(config.run_dir / "ended.json")
    assert ended is not None and (ended.kind, ended.code, ended.step) == ("task", 1, 4)
    assert ended.phase == {"feed": "forward", "data": "data"}[place]
    for run in (config, whole):
        pools(ranks).run(run_in_world, run)
    assert without_times(records(config)) == without_times(records(whole))
    ended = Outcome.read(config.run_dir / "ended.json")
    assert ended is not None and (ended.kind, ended.code, ended.step) == ("complete", 0, 6)


def cancel() -> None:
    raise asyncio.CancelledError


def run_exiting(config: Config, place: str, at: int, leave: Callable[[], None]) -> str:
    with failing(place, at, leave):
        return error_of(config)


@pytest.mark.parametrize(
    ("place", "leave", "raised"),
    [("feed", partial(sys.exit, 0), "SystemExit(0)"), ("data", cancel, "CancelledError()")],
)
def test_an_exit_by_the_task_is_an_error(
    two_ranks: RankPool, tmp_path: Path, place: str, leave: Callable[[], None], raised: str
) -> None:
    """As all that is no Exception: the steps before it are saved, and no launcher may see a 0."""
    config = accumulated(tmp_path, stage=2)
    for error in two_ranks.run(run_exiting, config, place, 7, leave):
        assert f"{__file__}:" in error and f"the task's code has raised {raised}" in error
    assert steps_saved(config) == [3]
    assert f"has raised {raised}\nsaving a checkpoint" in log_text(config)


def test_what_cannot_be_fetched_ahead_ends_the_run_after_the_step(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    """With weights, the micro-batches of step 5 are fetched at the end of step 3."""
    args = {"weigh": True, "dropout": 0.3}
    task = {"path": str(ROOT / "tests/tasks/evaluated_task.py"), "args": args}
    config, whole = (tiny_config(tmp_path / name, 1, task=task) for name in "ab")
    two_ranks.run(run_failing, config, "data", 5, (0, 1))
    assert steps_saved(config) == [3] == [record["step"] for record in records(config)][-1:]
    for run in (config, whole):
        two_ranks.run(run_in_world, run)
    assert losses(config) == losses(whole)


def test_nothing_is_saved_in_the_middle_of_an_optimizers_step(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    config = accumulated(tmp_path)
    two_ranks.run(run_failing, config, "step", 3, (0, 1))
    assert [record["step"] for record in records(config)] == [1, 2]
    assert steps_saved(config) == []
    assert "no checkpoint is saved" in log_text(config)


def run_failing_after_an_edit(config: Config) -> None:
    """Every step but the first edits the weights; step 4 fails."""
    original = engines.feed

    def edit_and_feed(task: Task, engine: Any, batch: Any) -> Any:
        step, number = divmod(engine.counters.micro_step, 2)
        if step and not number:
            with engine.edit_weights() as model, torch.no_grad():
                next(model.parameters()).mul_(0.9)
        if (step, number) == (3, 1):
            fail(None, raises=True)
        return original(task, engine, batch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Unwell):
        patch.setattr(engines, "feed", edit_and_feed)
        run_in_world(config)


def test_nothing_is_saved_once_the_weights_have_been_edited_in_a_step(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    """A resumed run would take the step, and with it the edit, once more."""
    config = accumulated(tmp_path, 1, trainer={"save_every": 2})
    two_ranks.run(run_failing_after_an_edit, config)
    assert [record["step"] for record in records(config)] == [1, 2, 3]
    assert steps_saved(config) == [2]
    assert "no checkpoint is saved" in log_text(config)


def run_failing_with_slow_files(config: Config, place: str, at: int) -> None:
    original = save.write_files

    def slow(*args: Any) -> Any:
        time.sleep(0.5)
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save, "write_files", slow)
        run_failing(config, place, at, (0, 1))


def run_deleting(config: Config) -> str:
    with failing("feed", 5, partial(shutil.rmtree, config.run_dir), raises=False):
        return error_of(config)


def test_a_run_whose_directory_is_deleted_ends(pools: Pools, tmp_path: Path) -> None:
    config = accumulated(tmp_path)
    [error] = pools(1).run(run_deleting, config)
    assert f"{config.run_dir}: this run's directory was deleted" in error
    assert not config.run_dir.exists()


@pytest.mark.parametrize(("place", "at"), [("step", 3), ("feed", 5)])
def test_a_save_in_the_background_is_completed(
    two_ranks: RankPool, tmp_path: Path, place: str, at: int
) -> None:
    """Also if the step that failed cannot be saved itself; it is that after the save."""
    settings = {"trainer": {"save_every": 2}, "checkpoint": {"background": True}}
    config = accumulated(tmp_path, **settings)
    two_ranks.run(run_failing_with_slow_files, config, place, at)
    assert steps_saved(config) == [2]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_save_in_the_background_outlives_a_rank(pools: Pools, tmp_path: Path, rank: int) -> None:
    """All ranks have written it, and one fails before they could commit it: in the next step."""
    settings = {"trainer": {"save_every": 2}, "checkpoint": {"background": True}}
    config = accumulated(tmp_path, 2, **settings)
    with pytest.raises(RankError, match="unwell"):
        pools(2).run(alone, config, "feed", 5, rank, None)
    assert steps_saved(config) == [2]
    assert (config.run_dir / "checkpoints/latest").read_text() == "step-00000002\n"
    pools(2).run(run_in_world, config)
    assert f"resumed from {checkpoint(config, 2)}" in log_text(config)


def ended_at_the_last_step(config: Config, by: str) -> str:
    """A signal, which is obeyed at the last step, or an error of the evaluation that follows it."""
    if by == "signal":
        with failing("feed", 10, partial(os.kill, os.getpid(), signal.SIGTERM), raises=False):
            return str(run_in_world(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines.Engines, "evaluate", lambda *_: fail(None, raises=True))
        return error_of(config)


@pytest.mark.parametrize("by", ["signal", "error"])
def test_what_follows_the_last_step_is_left_to_the_next_start(
    two_ranks: RankPool, tmp_path: Path, by: str
) -> None:
    """The evaluation and the export, once."""
    config = accumulated(tmp_path, 2)
    ended = two_ranks.run(ended_at_the_last_step, config, by)
    assert all({"signal": "143", "error": "Unwell: it is unwell"}[by] in text for text in ended)
    assert steps_saved(config) == [6] and records(config, "eval/loss") == []
    assert not exports(config).exists()
    for _ in range(2):
        two_ranks.run(run_in_world, config)
        assert [record["step"] for record in records(config, "eval/loss")] == [6]
        assert exports(config).exists() and steps_saved(config) == [6]
    assert log_text(config).count("the run is complete") == 1


def alone(config: Config, place: str, at: int, rank: int, how: Any) -> None:
    """A run that fails on one rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.rescue.SECONDS_TO_FAIL_TOGETHER", 0.3)
        if distributed.global_rank() != rank:
            run_in_world(config)
            return
        with failing(place, at, how):
            run_in_world(config)


@pytest.mark.parametrize(("rank", "how"), [(0, None), (1, die)])
def test_a_failure_of_one_rank_loses_no_record(
    two_ranks: RankPool, tmp_path: Path, rank: int, how: Any
) -> None:
    """Rank 0 fails, or another rank dies and rank 0 with it."""
    config = accumulated(tmp_path, 1)
    with pytest.raises(RankError, match="unwell" if rank == 0 else "exit code 7"):
        two_ranks.run(alone, config, "feed", 8, rank, how)
    found = records(config)
    assert [record["step"] for record in found] == [1, 2, 3]
    assert [record.get("ranks") for record in found] == [None, 1, 1]
    assert all(record["loss"] > 0 and record["step_time_s"] > 0 for record in found)
    assert steps_saved(config) == []
    ended = Outcome.read(config.run_dir / "ended.json")
    assert ended is not None
    if rank == 0:  # not what the other one met
        assert (ended.kind, ended.rank, ended.step, ended.phase) == ("task", 0, 4, "forward")
        assert ended.reason == "Unwell: it is unwell"
    else:
        assert (ended.kind, ended.code, ended.rank, ended.step) == ("lost_rank", 75, 1, 4)


class EndsEarly:
    """A loader of 100 batches, of which there are 7."""

    def __init__(self, dataset: Any, has_state: bool):
        self.dataset = dataset
        if has_state:
            self.state_dict = dict
            self.load_state_dict = lambda state: None

    def __len__(self) -> int:
        return 100

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, 28, 4):
            yield default_collate([self.dataset[start + n] for n in range(4)])


@pytest.mark.parametrize("has_state", [False, True])
def test_a_loader_that_ends_early(pools: Pools, tmp_path: Path, has_state: bool) -> None:
    """In the middle of step 4: a loader with a state of its own cannot be rewound."""
    config = accumulated(tmp_path)
    pools(1).run(with_early_end, config, has_state)
    assert [record["step"] for record in records(config)] == [1, 2, 3]
    assert steps_saved(config) == ([] if has_state else [3])
    assert "ended after 7" in log_text(config)


def with_early_end(config: Config, has_state: bool) -> None:
    def with_loader(config: Config, build: Any = None) -> Any:
        task = load_task(config, build)
        task.train_data = EndsEarly(task.train_data, has_state)
        return task

    with pytest.raises(Exception, match="ended after 7"):
        run_in_world(config, None, with_loader)
