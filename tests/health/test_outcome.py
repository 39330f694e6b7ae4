"""What is written of a run's end, and which of several ranks' words stays."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.errors import CheckpointError, ConfigError, GradientError, LostRank, TaskError
from harness.health import outcome, phases
from harness.health.outcome import RESTART_CODE, VARIABLE, Kind, Outcome


class OutOfMemoryError(RuntimeError):
    """Stands for torch's, by its name: the room does not import torch."""


def here(error: BaseException) -> BaseException:
    """The error, raised in a file that is not of harness."""
    try:
        raise error
    except BaseException as raised:
        return raised


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (ConfigError("run.steps"), "config", 2),
        (TaskError("no loss"), "task", 1),
        (CheckpointError("a disk"), "checkpoint", 1),
        (GradientError("mixed up"), "gradients", 1),
        (LostRank("rank 1"), "lost_rank", RESTART_CODE),
        (OutOfMemoryError("20 GiB"), "oom", RESTART_CODE),
        (MemoryError(), "oom", RESTART_CODE),
        (KeyError("loss"), "task", 1),
        (OSError(5, "Input/output error"), "error", 1),
        (KeyboardInterrupt(), "signal", 130),
    ],
)
def test_every_error_has_a_kind_and_a_code(error: BaseException, kind: str, code: int) -> None:
    found = Outcome.of(here(error))
    assert (found.kind, found.code) == (kind, code)


def test_an_error_within_harness_is_not_of_the_task() -> None:
    with pytest.raises(KeyError) as caught:
        phases.enter("sleep")  # type: ignore[arg-type]
    error = caught.value
    assert error.__traceback__ is not None
    error.__traceback__ = error.__traceback__.tb_next
    assert Outcome.of(error).kind == "error"


def test_it_tells_rank_step_and_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    phases.at_step(12)
    with pytest.raises(KeyError) as caught, phases.during("data"):
        raise KeyError("speaker")
    found = Outcome.of(caught.value)
    assert (found.rank, found.step, found.phase) == (3, 12, "data")
    assert found.reason == "KeyError: 'speaker'" and found.host
    everywhere = TaskError("no loss")
    everywhere.on_all_ranks = True
    assert Outcome.of(everywhere).rank is None


def named(kind: Kind, rank: int | None = None) -> Outcome:
    return Outcome(kind, 1, rank=rank)


@pytest.mark.parametrize(
    ("first", "second", "stays"),
    [
        (named("task", 1), named("lost_rank"), "first"),
        (named("lost_rank"), named("task", 1), "second"),
        (named("lost_rank"), named("lost_rank", 1), "second"),
        (named("lost_rank", 1), named("lost_rank", 0), "first"),  # ended by its launcher
        (named("task", 1), named("signal"), "first"),
        (named("signal"), named("hang", 1), "second"),
        (named("complete"), named("lost_rank", 1), "first"),
        (named("task", 1), named("task", 0), "first"),
    ],
)
def test_the_outcome_that_tells_most_stays(
    tmp_path: Path, first: Outcome, second: Outcome, stays: str
) -> None:
    for ended in (first, second):
        ended.write(tmp_path)
    stayed = replace(first if stays == "first" else second, run_dir=str(tmp_path))
    assert Outcome.read(tmp_path / "ended.json") == stayed
    assert [path.name for path in tmp_path.iterdir()] == ["ended.json"]


def test_it_is_written_to_both_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a run directory only to the one that the environment names."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "outcome.json"))
    named("config").write(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    outcome.forget_of_environment()
    assert not (tmp_path / "outcome.json").exists()
    monkeypatch.setattr(outcome, "_run_dir", tmp_path)
    named("quit").write()
    texts = [(tmp_path / name).read_text() for name in ("outcome.json", "ended.json")]
    assert texts[0] == texts[1] and json.loads(texts[0])["kind"] == "quit"


@pytest.mark.parametrize("text", ["", "[]", '{"kind": "task"}', '{"kind": "new", "more": 1}'])
def test_a_file_with_something_else_is_replaced(tmp_path: Path, text: str) -> None:
    (tmp_path / "ended.json").write_text(text)
    assert Outcome.read(tmp_path / "ended.json") is None
    named("task", 1).write(tmp_path)
    assert Outcome.read(tmp_path / "ended.json") is not None


def test_a_disk_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*paths: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(outcome.os, "link", link)
    named("task", 1).write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["ended.json"]


def test_what_cannot_be_written_does_not_hide_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "missing" / "outcome.json"))
    named("task", 1).write(tmp_path)
    assert (tmp_path / "ended.json").exists()
