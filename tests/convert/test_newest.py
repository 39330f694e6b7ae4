"""What is the newest checkpoint: for a resume, `harness convert` and `init_from` the same one."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from harness import distributed
from harness.checkpoint import resume
from harness.checkpoint.disks import Disks
from harness.checkpoint.inspect import describe_path
from harness.convert import open_checkpoint, run_checkpoints
from harness.convert.dropped_saves import FILE
from harness.convert.resolve_source import resolve_source
from harness.convert.run_checkpoints import steps_in
from harness.engine.engines import Engines
from harness.errors import CheckpointError
from harness.files import json_write
from tests.checkpoint.test_disks import on
from tests.checkpoint.test_retention import make
from tests.checkpoint.test_unreadable import edit, newer, unreadable_manifest
from tests.support.helpers import Pools

LATER = 4e9
"""A time after that of any file."""


def drop(parent: Path, *spans: tuple[float, float], **more: Any) -> None:
    json_write({"spans": spans, "left": [], "kept": []} | more, parent / FILE)


def dropped(parent: Path) -> None:
    drop(parent, (2.0, LATER))


def dropped_in_a_list(parent: Path) -> None:
    json_write([[2.0, LATER]], parent / FILE)


def left(parent: Path) -> None:
    drop(parent, left=[[2.0, LATER]])


def kept(parent: Path) -> None:
    drop(parent, (1.0, LATER), kept=[[2.0, LATER]])


def dropped_by_a_newer_version(parent: Path) -> None:
    dropped(parent)
    newer(parent / "step-00000003")


def returned_to_and_unreadable(parent: Path) -> None:
    """Its manifest was written after `saved_at`, so its time is in the span."""
    dropped(parent)
    unreadable_manifest(parent / "step-00000002")


def returned_to_and_newer(parent: Path) -> None:
    dropped(parent)
    newer(parent / "step-00000002")


def dropped_and_without_manifest(parent: Path) -> None:
    dropped(parent)
    (parent / "step-00000003/manifest.json").unlink()


def saved_later(parent: Path) -> None:
    drop(parent, (1.0, 2.5))


def copied_with_other_times(parent: Path) -> None:
    drop(parent, (2.0, 3.0))
    for path in parent.rglob("*"):
        os.utime(path, (2.5, 2.5))


def not_finite(parent: Path) -> None:
    drop(parent, (0.0, 1.0))
    path = parent / "step-00000003/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"finite": False}))


def damaged(text: str) -> Callable[[Path], None]:
    def write(parent: Path) -> None:
        (parent / FILE).write_text(text)

    return write


def a_directory(parent: Path) -> None:
    (parent / FILE).mkdir()


CASES: list[tuple[Callable[[Path], None], str]] = [
    (dropped, "step-00000002"),
    (dropped_in_a_list, "step-00000002"),
    (left, "step-00000002"),
    (kept, "step-00000002"),
    (dropped_by_a_newer_version, "step-00000002"),
    (dropped_and_without_manifest, "step-00000002"),
    (saved_later, "step-00000003"),
    (copied_with_other_times, "step-00000002"),
    (not_finite, "step-00000002"),
    (returned_to_and_unreadable, "cannot read"),
    (returned_to_and_newer, "has format 99"),
    (damaged(""), FILE),
    (damaged("[[1.0]]"), FILE),
    (damaged('{"spans": []}'), FILE),
    (damaged(f"[[0, 1{'0' * 400}]]"), FILE),
    (damaged("[" * 100_000), FILE),
    (a_directory, FILE),
]


def chosen_by_a_resume(parent: Path, disks: Disks) -> str:
    """The name of the checkpoint, or why there is none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "check_compatible", lambda *_: None)
        try:
            found = resume.choose_checkpoint(
                "latest", parent, cast(Engines, None), disks, lambda *_: None
            )
        except CheckpointError as error:
            return str(error)
    return found.name if found else ""


def chosen_by_convert(path: Path) -> str:
    """As `chosen_by_a_resume`. The checkpoints have no engine, which is found out last."""
    with pytest.raises(CheckpointError) as failure:
        resolve_source(path)
    return str(failure.value)


@pytest.mark.parametrize(("case", "expected"), CASES)
def test_convert_takes_what_a_resume_takes(
    pools: Pools, tmp_path: Path, case: Callable[[Path], None], expected: str
) -> None:
    parent = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        make(parent, step)
    (parent / "latest").write_text("step-00000003\n")
    case(parent)
    for path in (tmp_path, parent, parent / "latest"):
        text = chosen_by_convert(path)
        if expected.startswith("step"):
            assert text.startswith(f"{parent / expected}: expected one engine, found none")
        else:
            assert expected in text and "expected one engine" not in text
    (found,) = pools(1).run(chosen_by_a_resume, parent, Disks((0,)))
    assert found == expected if expected.startswith("step") else expected in found


def chosen_on_two_disks(parent: Path, step: int) -> str:
    """By a resume; the second disk does not give the manifest of a step."""
    for each in (1, 2, 3):
        make(parent, each)
    dropped(parent)
    if distributed.global_rank() == 1:
        unreadable_manifest(parent / f"step-0000000{step}")
    return chosen_by_a_resume(parent, Disks((0, 1)))


@pytest.mark.parametrize(("step", "expected"), [(3, "step-00000002"), (2, "cannot read")])
def test_what_one_of_two_disks_does_not_give(
    pools: Pools, tmp_path: Path, step: int, expected: str
) -> None:
    """That it is dropped the other one may know."""
    found = pools(2).run(on, "ab", tmp_path, chosen_on_two_disks, Path("new"), step)
    assert all(expected in text for text in found), found


@pytest.mark.parametrize("where", [(run_checkpoints, "named_in"), (open_checkpoint, "steps_in")])
def test_what_a_run_removes_meanwhile_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: tuple[Any, str]
) -> None:
    for step in (1, 2):
        make(tmp_path, step)
    dropped(tmp_path)
    listed = getattr(*where)
    monkeypatch.setattr(*where, lambda parent: [parent / "step-00000003", *listed(parent)])
    assert chosen_by_convert(tmp_path).startswith(f"{tmp_path / 'step-00000002'}: expected one")


def test_what_a_rollback_drops_meanwhile_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        make(tmp_path, step)

    def listed(parent: Path) -> list[Path]:
        found = steps_in(parent)
        dropped(parent)
        return found

    monkeypatch.setattr(open_checkpoint, "steps_in", listed)
    assert chosen_by_convert(tmp_path).startswith(f"{tmp_path / 'step-00000002'}: expected one")


@pytest.mark.parametrize("damage", [damaged("[[1.0]]"), a_directory])
def test_inspect_describes_all_beside_a_damaged_file_of_what_is_dropped(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """And calls no checkpoint damaged for that."""
    for step in (1, 2):
        make(tmp_path, step)
        (tmp_path / f"step-0000000{step}/net/shard.pt").write_text("")
        edit(tmp_path / f"step-0000000{step}", files={})
    damage(tmp_path)
    lines: list[str] = []
    with pytest.raises(CheckpointError, match=rf": {FILE}$"):
        lines.extend(describe_path(tmp_path))
    assert sum(line.endswith("sizes checked: complete") for line in lines) == 2
    assert any(f"{tmp_path / FILE}" in line for line in lines)
    one: list[str] = []
    with pytest.raises(CheckpointError, match=f"{tmp_path / FILE}"):
        one.extend(describe_path(tmp_path / "step-00000002"))
    assert one[-1].endswith("sizes checked: complete")


def test_inspect_marks_what_is_dropped_from_within_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (2, 3):
        edit(make(tmp_path, step), files={})
    dropped(tmp_path)
    for name in ("step-00000002", "step-00000003"):
        monkeypatch.chdir(tmp_path / name)
        is_marked = any("dropped by a rollback" in line for line in describe_path(Path()))
        assert is_marked == (name == "step-00000003")
