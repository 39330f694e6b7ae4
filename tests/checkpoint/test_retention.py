"""Which checkpoints stay: the newest, the best, every N-th, and those with a name."""

import math
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.checkpoint.files import FileEntry
from harness.checkpoint.manifest import Manifest, mark_safe, read_manifest, step_directory
from harness.checkpoint.retention import (
    PRUNED,
    REPLACED,
    Removals,
    clean,
    move_into_place,
    prune,
    remove_replaced,
)
from harness.config.sections import CheckpointConfig
from harness.convert.run_checkpoints import checkpoints_in


def make(
    parent: Path,
    step: int,
    loss: float | None = None,
    pinned: str | None = None,
    finite: bool | None = None,
) -> Path:
    directory = step_directory(parent, step)
    directory.mkdir(parents=True)
    (directory / "net").mkdir()
    (directory / "net/shard.pt").write_text("x")
    Manifest(
        step=step,
        world_size=1,
        engines={},
        files={"net/shard.pt": FileEntry(size=1, digest="", rank=0)},
        hosts=["a"],
        config_digest="",
        pinned=pinned,
        metrics={} if loss is None else {"eval/loss": loss},
        finite=finite,
        saved_at=float(step),
    ).write(directory)
    return directory


LOSSES = {1: 9.0, 2: 1.0, 3: 2.0, 4: 8.0, 5: 7.0, 6: None, 7: 5.0}


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({}, [7, 6, 5, 4, 3, 2, 1]),
        ({"keep_last": 1}, [7, 4]),
        ({"keep_last": 3}, [7, 6, 5, 4]),
        ({"keep_last": 1, "keep_best": 2}, [7, 4, 3, 2]),
        ({"keep_last": 1, "keep_best": 1, "best_mode": "max"}, [7, 4, 1]),
        ({"keep_last": 1, "keep_best": 1, "best_metric": "eval/other"}, [7, 4]),
        ({"keep_last": 2, "keep_every": 3}, [7, 6, 4, 3]),
    ],
)
def test_rules(tmp_path: Path, settings: dict[str, Any], left: list[int]) -> None:
    for step, loss in LOSSES.items():
        make(tmp_path, step, loss, pinned="name" if step == 4 else None)
    prune(tmp_path, CheckpointConfig(**settings))
    assert checkpoints_in(tmp_path) == [step_directory(tmp_path, step) for step in left]
    assert not list(tmp_path.glob("*.tmp"))


NAN = math.nan


@pytest.mark.parametrize(
    ("losses", "not_finite", "settings", "left"),
    [
        ([1.0, NAN, 0.5], (), {"keep_last": 1, "keep_best": 1}, [3]),
        ([0.5, NAN, 1.0], (), {"keep_last": 1, "keep_best": 1}, [3, 1]),
        ([1.0, NAN, 0.5], (), {"keep_last": 1, "keep_best": 2, "best_mode": "max"}, [3, 1]),
        ([NAN, 2.0, NAN, NAN], (), {"keep_last": 1, "keep_best": 9}, [4, 2]),
        ([2.0, math.inf, 1.0], (), {"keep_last": 1, "keep_best": 1, "best_mode": "max"}, [3, 1]),
        ([1.0, 0.1, 2.0], (2,), {"keep_last": 1, "keep_best": 1}, [3, 1]),
        ([None] * 5, (3, 4, 5), {"keep_last": 2}, [5, 2, 1]),
        ([None, 1.0, NAN, NAN, None], (5,), {"keep_last": 1}, [5, 4, 2]),
        ([None] * 3, (1, 2, 3), {"keep_last": 2}, [3]),
    ],
)
def test_what_is_not_finite_is_neither_the_best_nor_the_last_good_one(
    tmp_path: Path,
    losses: list[float | None],
    not_finite: tuple[int, ...],
    settings: dict[str, Any],
    left: list[int],
) -> None:
    """Pruned after each save, as in a run."""
    for step, loss in enumerate(losses, start=1):
        make(tmp_path, step, loss, finite=step not in not_finite)
        prune(tmp_path, CheckpointConfig(**settings))
    assert checkpoints_in(tmp_path) == [step_directory(tmp_path, step) for step in left]


@pytest.mark.parametrize(
    ("on_this_disk", "left"),
    [((7,), [7, 6, 5]), ((5, 7), [7, 6, 4]), ((1, 5), [7, 6]), ((3, 4, 5, 6), [7, 6, 2])],
)
def test_what_is_on_one_disk_only_does_not_count_and_is_removed_when_it_is_old(
    tmp_path: Path, on_this_disk: tuple[int, ...], left: list[int]
) -> None:
    everywhere = [make(tmp_path, step).name for step in LOSSES]
    for step in on_this_disk:
        everywhere.remove(step_directory(tmp_path, step).name)
    prune(tmp_path, CheckpointConfig(keep_last=2), everywhere)
    assert checkpoints_in(tmp_path) == [step_directory(tmp_path, step) for step in left]


def test_the_newest_safe_one_of_those_that_count_stays(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        directory = make(tmp_path, step)
        if step != 2:
            mark_safe(directory, read_manifest(directory))
    counted = [step_directory(tmp_path, step).name for step in (1, 2)]
    prune(tmp_path, CheckpointConfig(keep_last=1), counted)
    assert len(checkpoints_in(tmp_path)) == 3


def test_the_newest_is_the_one_that_was_saved_last(tmp_path: Path) -> None:
    for step in (9, 3, 5):
        directory = make(tmp_path, step)
        text = (directory / "manifest.json").read_text()
        order = {9: 1.0, 3: 3.0, 5: 2.0}[step]
        (directory / "manifest.json").write_text(
            text.replace(f'"saved_at": {step}.0', f'"saved_at": {order}')
        )
    assert [path.name[-1] for path in checkpoints_in(tmp_path)] == ["3", "5", "9"]


def test_what_latest_names_stays(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        make(tmp_path, step)
    (tmp_path / "latest").write_text("step-00000001\n")
    prune(tmp_path, CheckpointConfig(keep_last=1))
    assert checkpoints_in(tmp_path) == [step_directory(tmp_path, step) for step in (3, 1)]


def test_files_are_deleted_behind_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No checkpoint at once; its files and its name are there until the thread comes to it."""
    may_delete = threading.Event()

    def rmtree(path: Path) -> None:
        assert may_delete.wait(10)
        if path.name.startswith("step-00000001"):
            raise OSError("stuck")
        shutil.rmtree(path)

    monkeypatch.setattr("harness.checkpoint.retention.shutil", SimpleNamespace(rmtree=rmtree))
    for step in (1, 2, 3):
        make(tmp_path, step)
    removals = Removals()
    prune(tmp_path, CheckpointConfig(keep_last=1), delete=removals.add)
    names = {f"step-0000000{step}{PRUNED}" for step in (1, 2)}
    assert {path.name for path in tmp_path.iterdir()} == names | {"step-00000003"}
    may_delete.set()
    removals.wait()
    assert {path.name for path in tmp_path.iterdir()} == names - {f"step-00000002{PRUNED}"} | {
        "step-00000003"
    }
    assert f"cannot remove {tmp_path / f'step-00000001{PRUNED}'}: stuck" in caplog.text
    removals.close()


def test_a_damaged_checkpoint_is_left_alone(tmp_path: Path) -> None:
    make(tmp_path, 1)
    make(tmp_path, 2)
    (make(tmp_path, 3) / "manifest.json").write_text("{")
    prune(tmp_path, CheckpointConfig(keep_last=1))
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000002", "step-00000003"}


def test_what_a_crash_left_is_removed(tmp_path: Path) -> None:
    make(tmp_path, 1)
    make(tmp_path, 2).rename(tmp_path / f"step-00000002{REPLACED}")  # its successor never came
    make(tmp_path, 3).rename(tmp_path / f"step-00000003{PRUNED}")
    make(tmp_path, 4).rename(tmp_path / "step-00000004.tmp")
    make(tmp_path, 1 + 4).rename(tmp_path / f"step-00000001{REPLACED}")  # its successor is there
    clean(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", "step-00000002"}


def test_a_replacement_on_one_disk_only_is_undone(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        make(tmp_path, step).rename(tmp_path / f"step-{step:08d}{REPLACED}")
    for step, loss in ((1, 1.0), (2, 2.0)):
        make(tmp_path, step, loss)
    clean(tmp_path, unfinished={"step-00000002", "step-00000009"})
    assert {path.name for path in tmp_path.iterdir()} == {f"step-{n:08d}" for n in (1, 2, 3)}
    metrics = [read_manifest(step_directory(tmp_path, step)).metrics for step in (1, 2)]
    assert metrics == [{"eval/loss": 1.0}, {}]


def test_an_export_replaces_the_one_of_the_same_step(tmp_path: Path) -> None:
    """It has no manifest, and is not kept."""
    for text in ("old", "new"):
        (tmp_path / "step.tmp").mkdir()
        (tmp_path / "step.tmp/net.sft").write_text(text)
        move_into_place(tmp_path / "step.tmp", tmp_path / "step")
        remove_replaced(tmp_path / "step")
    assert [path.name for path in tmp_path.iterdir()] == ["step"]
    assert (tmp_path / "step/net.sft").read_text() == "new"
