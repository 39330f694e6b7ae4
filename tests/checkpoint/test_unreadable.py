"""A checkpoint that cannot be judged is neither passed over nor removed, by anything."""

import json
from pathlib import Path
from typing import Any

import pytest

from harness.checkpoint.inspect import describe_path
from harness.checkpoint.manifest import read_manifest
from harness.checkpoint.retention import REPLACED, clean, delete_replaced, prune
from harness.config.sections import CheckpointConfig
from harness.convert.resolve_source import resolve_source
from harness.convert.run_checkpoints import KEPT, checkpoints_in
from harness.errors import CheckpointError, UnreadableCheckpoint
from harness.run import run_in_world
from harness.testing.pool import RankPool
from tests.checkpoint.test_retention import make
from tests.support.helpers import checkpoint, error_of, log_text, tiny_config

EIO = Path("/proc/self/mem")
"""A file whose first bytes cannot be read: an I/O error."""


def edit(directory: Path, **changes: Any) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def newer(directory: Path) -> str:
    edit(directory, format=99, streams={}, versions={"harness": "9.9.9"})
    return "has format 99, written by harness 9.9.9; harness 0.1.0 reads format 4: update harness"


def newer_key(directory: Path) -> str:
    edit(directory, streams={})
    return "manifest.json has 'streams', which this version of harness does not know"


def unreadable_manifest(directory: Path) -> str:
    (directory / "manifest.json").unlink()
    (directory / "manifest.json").symlink_to(EIO)
    return "manifest.json: Input/output error"


def unreadable_file(directory: Path) -> str:
    manifest = json.loads((directory / "manifest.json").read_text())
    name = next(name for name in manifest["files"] if name.endswith("model_states.pt"))
    manifest["files"][name]["size"] = 0  # as the other file's, so that its bytes are asked for
    edit(directory, files=manifest["files"])
    (directory / name).unlink()
    (directory / name).symlink_to(EIO)
    return "model_states.pt: Input/output error"


OF_MANIFEST = [newer, newer_key, unreadable_manifest]


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.mark.parametrize("damage", [newer, unreadable_file])
def test_a_run_refuses_to_start(two_ranks: RankPool, tmp_path: Path, damage: Any) -> None:
    every: Any = {"trainer": {"save_every": 2, "export_at_end": False}}
    config = tiny_config(tmp_path, run={"steps": 4}, **every)
    two_ranks.run(run_in_world, config)
    reason = damage(checkpoint(config, 4))
    manifest = (checkpoint(config, 4) / "manifest.json").read_text()
    longer = tiny_config(tmp_path, **every)
    errors = two_ranks.run(error_of, longer)
    assert all(reason in text and "set run.resume to its path" in text for text in errors), errors
    assert str(checkpoint(config, 4)) in errors[0]
    assert (checkpoint(config, 4) / "manifest.json").read_text() == manifest
    assert "resumed from" not in log_text(config)
    named = tiny_config(tmp_path, run={"resume": str(checkpoint(config, 2))}, **every)
    two_ranks.run(run_in_world, named)
    parent = config.run_dir / "checkpoints"
    assert names(parent) >= {"step-00000006", "step-00000004", "step-00000002"}
    assert read_manifest(checkpoint(config, 4)).step == 4
    if damage is newer:
        kept = parent / f"step-00000004{KEPT}"
        assert (kept / "manifest.json").read_text() == manifest


def test_a_run_names_what_it_passes_over_and_keeps_what_has_no_manifest(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    """`latest` is for people: without it the same checkpoints are found."""
    every: Any = {"trainer": {"save_every": 2, "export_at_end": False}}
    config = tiny_config(tmp_path, run={"steps": 6}, **every)
    two_ranks.run(run_in_world, config)
    parent = config.run_dir / "checkpoints"
    (parent / "latest").unlink()
    (parent / "step-00000006/manifest.json").unlink()
    (parent / "step-00000004/net").rename(parent / "step-00000004/gen")
    rank_file = (parent / "step-00000006/rank-00001.pt").read_bytes()
    two_ranks.run(run_in_world, tiny_config(tmp_path, run={"steps": 8}, **every))
    text = log_text(config)
    assert "step-00000006 is not a checkpoint: it has no manifest.json" in text
    assert "step-00000004 on host" in text and "net/mp_rank_00_model_states.pt" in text
    assert text.index("skipped: ") < text.index("resumed from")
    assert f"resumed from {parent / 'step-00000002'}" in text
    steps = {f"step-0000000{step}" for step in (2, 4, 6, 8)}
    assert names(parent) == {*steps, "latest", "best", f"step-00000006{KEPT}"}
    assert (parent / f"step-00000006{KEPT}/rank-00001.pt").read_bytes() == rank_file
    assert "is replaced; the old one is kept as" in text
    for step in steps:
        (parent / step / "manifest.json").unlink()
    for resume, message in (("latest", "no checkpoint is complete"), ("none", "has 4 checkpoints")):
        again = tiny_config(tmp_path, run={"resume": resume}, **every)
        assert all(message in error for error in two_ranks.run(error_of, again))


def test_without_its_manifest_it_is_passed_over_by_name(tmp_path: Path) -> None:
    for step in (1, 2):
        make(tmp_path, step)
    (tmp_path / "step-00000002/manifest.json").unlink()
    reason = "step-00000002 is not a checkpoint: it has no manifest.json"
    passed_over: list[str] = []
    with pytest.raises(CheckpointError, match="step-00000001: expected one engine, found none"):
        resolve_source(tmp_path, on_note=passed_over.append)
    assert len(passed_over) == 1 and reason in passed_over[0]
    lines: list[str] = []
    with pytest.raises(CheckpointError, match=r"incomplete on this host: step-00000002, "):
        lines.extend(describe_path(tmp_path))
    assert any(reason in line for line in lines)
    prune(tmp_path, CheckpointConfig(keep_last=1))
    clean(tmp_path)
    assert names(tmp_path) == {"step-00000001", "step-00000002"}


@pytest.mark.parametrize("damage", OF_MANIFEST)
def test_retention_and_cleaning_leave_it(tmp_path: Path, damage: Any) -> None:
    for step in (1, 2, 3):
        make(tmp_path, step)
    reason = damage(tmp_path / "step-00000001")
    with pytest.raises(UnreadableCheckpoint, match=reason):
        read_manifest(tmp_path / "step-00000001")
    prune(tmp_path, CheckpointConfig(keep_last=1))
    assert names(tmp_path) == {"step-00000001", "step-00000003"}
    make(tmp_path, 1 + 3).rename(tmp_path / f"step-00000001{REPLACED}")
    clean(tmp_path, unreadable={"step-00000001"})
    assert names(tmp_path) == {"step-00000001", f"step-00000001{REPLACED}", "step-00000003"}


def test_a_replaced_one_is_kept(tmp_path: Path) -> None:
    for step in (1, 2):
        newer(make(tmp_path, step))
        (tmp_path / f"step-{step:08d}").rename(tmp_path / f"step-{step:08d}{REPLACED}")
        make(tmp_path, step)
    delete_replaced(tmp_path / "step-00000001")
    clean(tmp_path)  # after a kill between the rename and the removal
    expected = {f"step-0000000{step}{end}" for step in (1, 2) for end in ("", KEPT)}
    assert names(tmp_path) == expected
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-00000002", "step-00000001"]


@pytest.mark.parametrize("name", ["step-00000001", "step-00000001-best"])
def test_several_replaced_ones_are_kept(tmp_path: Path, name: str) -> None:
    for _ in range(3):
        make(tmp_path, 1).rename(tmp_path / f"{name}{REPLACED}")
        (tmp_path / f"{name}{REPLACED}/manifest.json").unlink()
        make(tmp_path, 1).rename(tmp_path / name)
        delete_replaced(tmp_path / name)
        (tmp_path / name).rename(tmp_path / f"{name}{REPLACED}")
        delete_replaced(tmp_path / name)  # a complete one is removed
    assert names(tmp_path) == {f"{name}{end}{KEPT}" for end in ("", ".2", ".3")}
    assert not checkpoints_in(tmp_path)


def test_a_newer_one_is_in_its_place_in_the_order(tmp_path: Path) -> None:
    for step in (2, 1, 3):
        newer(make(tmp_path, step))
    assert [path.name[-1] for path in checkpoints_in(tmp_path)] == ["3", "2", "1"]


@pytest.mark.parametrize("method", ["stat", "iterdir"])
def test_a_directory_that_cannot_be_entered_is_not_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    make(tmp_path, 1)
    function = getattr(Path, method)

    def denied(path: Path, **options: Any) -> Any:
        if path in (tmp_path / "step-00000001/manifest.json", tmp_path / f"{method}"):
            raise PermissionError(13, "Permission denied", str(path))
        return function(path, **options)

    monkeypatch.setattr(Path, method, denied)
    if method == "stat":
        assert checkpoints_in(tmp_path) == [tmp_path / "step-00000001"]
        with pytest.raises(UnreadableCheckpoint, match=r"manifest\.json: Permission denied"):
            read_manifest(tmp_path / "step-00000001")
    else:
        (tmp_path / method).mkdir()
        with pytest.raises(PermissionError):
            checkpoints_in(tmp_path / method)


@pytest.mark.parametrize("damage", OF_MANIFEST)
def test_inspect_says_so(tmp_path: Path, damage: Any) -> None:
    reason = damage(make(tmp_path, 1))
    lines: list[str] = []
    with pytest.raises(CheckpointError, match=r"cannot be judged: step-00000001$"):
        lines.extend(describe_path(tmp_path))
    assert any(reason in line for line in lines)


@pytest.mark.parametrize("damage", [newer, unreadable_manifest])
def test_convert_refuses_it(tmp_path: Path, damage: Any) -> None:
    reason = damage(make(tmp_path, 1))
    with pytest.raises(UnreadableCheckpoint, match=reason):
        resolve_source(tmp_path / "step-00000001")
