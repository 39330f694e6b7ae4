"""Callbacks and sinks of a task: their moments, commands, errors and states, on two ranks."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import distributed
from harness.callbacks import Callback, CallbackRun, EarlyStopping
from harness.config import Config
from harness.errors import ConfigError, HarnessError, TaskError
from harness.run import run_in_world
from harness.task import Task, validate
from harness.testing.pool import RankPool
from tests.support.helpers import losses, records, tiny_config
from tests.tasks import tiny_task

MOMENTS = ("on_start", "on_step", "on_eval", "on_save", "on_export", "on_end")


def tiny(config: Config, **parts: Any) -> Task:
    """The tiny task with callbacks or sinks."""
    task = tiny_task.build(config)
    return Task(**{**vars(task), **parts})


class Noting(Callback):
    """Notes what it is called with, and draws random numbers."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def on_start(self, run: CallbackRun) -> None:
        self._note("start", run)

    def on_step(self, run: CallbackRun, metrics: Mapping[str, Any]) -> None:
        self._note("step", run, metrics["step"])

    def on_eval(self, run: CallbackRun, metrics: Mapping[str, Any]) -> None:
        self._note("eval", run, sorted(metrics))

    def on_save(self, run: CallbackRun, path: Path) -> None:
        self._note("save", run, path.name)

    def on_export(self, run: CallbackRun, path: Path) -> None:
        self._note("export", run, path.name)

    def on_end(self, run: CallbackRun) -> None:
        self._note("end", run)

    def _note(self, moment: str, run: CallbackRun, *what: Any) -> None:
        torch.rand(3)
        self.calls.append((moment, run.step, *what))


def noted(config: Config) -> list[Any]:
    callback = Noting()
    run_in_world(config, None, lambda config: tiny(config, callbacks=[Callback(), callback]))
    return callback.calls


def test_moments_are_the_same_on_every_rank_and_change_nothing(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    trainer = {"eval_every": 4, "save_every": 3, "export_at_end": False}
    task = {"args": {"dropout": 0.5}}
    config = tiny_config(tmp_path / "noted", trainer=trainer, task=task)
    first, second = two_ranks.run(noted, config)
    assert first == second
    metrics = ["epoch", "eval/accuracy", "eval/loss", "step", "time"]
    assert [call for call in first if call[0] != "step"] == [
        ("start", 0),
        ("eval", 0, metrics),
        ("save", 3, "step-00000003"),
        ("eval", 4, metrics),
        ("eval", 6, metrics),
        ("save", 6, "step-00000006"),
        ("end", 6),
    ]
    assert [call[2] for call in first if call[0] == "step"] == [1, 2, 3, 4, 5, 6]
    plain = tiny_config(tmp_path / "plain", trainer=trainer, task=task)
    two_ranks.run(run_in_world, plain)
    assert losses(plain) == losses(config)


def failing(config: Config, moment: str) -> str:
    """The error of a run whose callback fails on rank 1."""

    def fail(*_: Any) -> None:
        if distributed.global_rank() == 1:
            raise ValueError("it is unwell")

    callback = type("Failing", (Callback,), {moment: fail})()
    try:
        run_in_world(config, None, lambda config: tiny(config, callbacks=[callback]))
    except HarnessError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_error_on_one_rank_is_one_error_that_names_it(
    two_ranks: RankPool, tmp_path: Path, moment: str
) -> None:
    config = tiny_config(tmp_path, run={"steps": 3})
    first, second = two_ranks.run(failing, config, moment)
    assert first == second
    assert first.startswith(f"rank 1: callback Failing.{moment}, step ")
    assert first.endswith("ValueError: it is unwell\n")


def failing_beside_a_forward(config: Config) -> str:
    """The error of a run whose callback fails on rank 1, while rank 0 gathers weights with it."""

    class Sampling(Callback):
        def on_eval(self, run: CallbackRun, metrics: Mapping[str, Any]) -> None:
            if distributed.global_rank() == 1:
                raise ValueError("it is unwell")
            run.engines["net"](torch.zeros(4, 6), torch.zeros(4, dtype=torch.long))

    try:
        run_in_world(config, None, lambda config: tiny(config, callbacks=[Sampling()]))
    except HarnessError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_a_rank_that_fails_does_not_leave_others_waiting_in_a_forward(tmp_path: Path) -> None:
    zero = {"stage3_param_persistence_threshold": 0}
    engines = {"net": {"ds_overrides": {"zero_optimization": zero}}}
    config = tiny_config(tmp_path, 3, trainer={"eval_every": 2}, engines=engines)
    with RankPool(2) as ranks:  # of its own, whose collectives are aborted
        first, second = ranks.run(failing_beside_a_forward, config)
    assert "rank 1" in first
    assert second.startswith("callback Sampling.on_eval, step 0:")
    assert second.endswith("ValueError: it is unwell\n")


def test_an_evaluation_that_is_not_finite_is_never_better() -> None:
    callback, run = EarlyStopping(patience=3), Stopped()
    for value in (math.nan, 2.0, math.nan, 1.5, 1.6, math.nan, math.nan):
        assert not run.reasons
        callback.on_eval(run, {"eval/loss": value})  # type: ignore[arg-type]
    assert run.reasons == ["eval/loss was not better than 1.5 in the last 3 evaluations"]
    callback.load_state_dict({"best": None, "waited": 2})
    callback.on_eval(run, {"eval/loss": math.nan})  # type: ignore[arg-type]
    assert run.reasons[1] == "eval/loss was NaN in the last 3 evaluations"


class Stopped:
    """Stands for the run that a callback stops."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def stop(self, reason: str) -> None:
        self.reasons.append(reason)


@pytest.mark.parametrize(
    "state, error",
    [
        (ValueError("it is unwell"), "callback Failing.state_dict, step 2:"),
        ({"path": Path("x")}, "callback Failing: its state_dict must contain only tensors and"),
    ],
)
def test_a_state_that_could_not_be_restored_is_an_error_that_names_the_callback(
    two_ranks: RankPool, tmp_path: Path, state: Any, error: str
) -> None:
    config = tiny_config(tmp_path, run={"steps": 2})
    first, second = two_ranks.run(with_state, config, state)
    assert first == second and first.startswith(f"rank 1: {error}")


def with_state(config: Config, state: Any) -> str:
    """The error of a run whose callback has this state, or fails with it, on rank 1."""

    class Failing(Callback):
        def state_dict(self) -> dict[str, Any]:
            if distributed.global_rank() == 0:
                return {}
            if isinstance(state, Exception):
                raise state
            return state

    try:
        run_in_world(config, None, lambda config: tiny(config, callbacks=[Failing()]))
    except HarnessError as error:
        return str(error)
    return ""


class Commanding(Callback):
    """Changes the learning rate, from `on_step` and from `on_eval`; other ranks want others."""

    def on_step(self, run: CallbackRun, metrics: Mapping[str, Any]) -> None:
        if metrics["step"] == 2:
            run.command("lr 0.5" if run.is_leader else "lr 0.1")

    def on_eval(self, run: CallbackRun, metrics: Mapping[str, Any]) -> None:
        if run.step == 6:
            run.command("lr 0.25" if run.is_leader else "quit")


def commanding(config: Config) -> None:
    run_in_world(config, None, lambda config: tiny(config, callbacks=[Commanding()]))


def test_commands_are_rank_0s_and_executed_at_the_same_step(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, run={"steps": 8}, trainer={"eval_every": 2})
    two_ranks.run(commanding, config)
    # Step 2 is reported after step 3 or 4; two steps later, before step 7, it is 0.5.
    rates = [record["lr"] for record in records(config)]
    assert rates[:4] == [0.01] * 4 and rates[6:] == [0.25, 0.25]
    assert set(rates[4:6]) <= {0.01, 0.5} and 0.5 in rates


def stopping(config: Config) -> list[Any]:
    """A run of `EarlyStopping`, for which no evaluation is better by a million."""
    callback = EarlyStopping(patience=2, min_delta=1e6)
    run_in_world(config, None, lambda config: tiny(config, callbacks=[callback]))
    return list(callback.state_dict().values())


def test_early_stopping_ends_a_run_and_keeps_it_ended(two_ranks: RankPool, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, run={"steps": 50}, trainer={"eval_every": 2})
    (best, waited), other = two_ranks.run(stopping, config)
    found = records(config, "eval/")
    assert [best, waited] == other == [pytest.approx(found[0]["eval/loss"]), 2]
    assert [record["step"] for record in found] == [0, 2, 4]
    ended = json.loads((config.run_dir / "ended.json").read_text())
    assert (ended["kind"], ended["step"]) == ("quit", 4)
    assert ended["reason"].startswith("eval/loss was not better than 1.07")
    two_ranks.run(stopping, config)
    assert len(records(config)) == 4


def test_wrong_arguments_and_parts_are_refused() -> None:
    wrong: dict[str, Any]
    for wrong in ({"patience": 0}, {"mode": "least"}, {"min_delta": float("nan")}):
        (name,) = wrong
        with pytest.raises(ConfigError, match=f"EarlyStopping: {name} = .*: expected"):
            EarlyStopping(**wrong)
    part: Any
    for name, part in (("callbacks", Noting()), ("callbacks", [Noting]), ("sinks", [5])):
        parts: dict[str, Any] = {name: part}
        task = Task(models={}, train_data=[], **parts)
        with pytest.raises(TaskError, match=f"{name}: found .*, expected"):
            validate(task, "my_task.py")


class Listing:
    """A sink that keeps its records, and fails at one of them."""

    def __init__(self, fails_at: int | str = 0):
        self.records: list[Mapping[str, Any]] = []
        self.is_closed = False
        self._fails_at = fails_at

    def write(self, record: Mapping[str, Any]) -> None:
        if record["step"] == self._fails_at:
            raise OSError("no connection")
        self.records.append(record)

    def close(self) -> None:
        if self._fails_at == "close":
            raise OSError("no connection")
        self.is_closed = True


class Unopened(Listing):
    """A sink that cannot be opened."""

    def __init__(self, config: Config) -> None:
        raise OSError("no connection")


def listed(config: Config) -> tuple[bool, list[Any], list[Any]]:
    """What two sinks are given: one that is made of its class, one that is."""
    made, given = [], Listing()

    class Made(Listing):
        def __init__(self, config: Config) -> None:
            super().__init__()
            made.append(self)

    run_in_world(config, None, lambda config: tiny(config, sinks=[Made, given]))
    return given.is_closed, given.records, [record for sink in made for record in sink.records]


def test_sinks_are_given_all_records_on_rank_0(two_ranks: RankPool, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, run={"steps": 3})
    (is_closed, given, made), (_, *others) = two_ranks.run(listed, config)
    assert is_closed and given == made and others == [[], []]
    metrics = [record for record in given if "event" not in record]
    assert [record["step"] for record in metrics] == [1, 2, 3, 3]
    assert "eval/loss" in metrics[-1] or "eval/loss" in metrics[-2]
    events = [(r["step"], r["event"], Path(r["text"]).name) for r in given if "event" in r]
    assert events == [(3, "export", "step-00000003"), (3, "save", "step-00000003")]


def failing_sink(config: Config, step: int | str) -> str:
    sink = Unopened if step == "start" else Listing(step)
    try:
        run_in_world(config, None, lambda config: tiny(config, sinks=[sink]))
    except TaskError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("step", [2, 6])
def test_a_sink_that_fails_ends_the_run_on_all_ranks(
    two_ranks: RankPool, tmp_path: Path, step: int
) -> None:
    errors = two_ranks.run(failing_sink, tiny_config(tmp_path), step)
    assert errors == [f"rank 0: sink Listing, step {step}: OSError: no connection"] * 2


def test_a_sink_that_cannot_be_closed_is_named(two_ranks: RankPool, tmp_path: Path) -> None:
    errors = two_ranks.run(failing_sink, tiny_config(tmp_path, run={"steps": 1}), "close")
    assert errors == ["sink Listing, close: OSError: no connection", ""]


def test_a_sink_that_cannot_be_opened_is_named(two_ranks: RankPool, tmp_path: Path) -> None:
    errors = two_ranks.run(failing_sink, tiny_config(tmp_path), "start")
    assert len(set(errors)) == 1
    assert errors[0].startswith("rank 0: sink Unopened, at the start:\nTraceback")
    assert errors[0].endswith("OSError: no connection\n")
