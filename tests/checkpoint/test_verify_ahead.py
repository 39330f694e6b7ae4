"""What is checked while engines are built is not checked again, unless it has changed."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.checkpoint import files, verify_ahead
from harness.checkpoint.files import FileEntry
from harness.checkpoint.manifest import Manifest, step_directory
from harness.checkpoint.verify_ahead import VerifyAhead
from harness.checkpoint.written import write_file
from harness.errors import CheckpointError
from tests.support.helpers import flip_bit

NAMES = ["net/shard.pt", "rank-00000.pt"]


@pytest.fixture
def saved(tmp_path: Path) -> Manifest:
    manifests = []
    for step in (1, 2):
        directory = step_directory(tmp_path, step)
        (directory / "net").mkdir(parents=True)
        entries = {name: write_file({"a": torch.ones(999)}, directory / name) for name in NAMES}
        facts: dict[str, Any] = {
            "world_size": 1,
            "engines": {},
            "hosts": ["a"],
            "config_digest": "",
        }
        manifests.append(Manifest(step=step, files=entries, saved_at=float(step), **facts))
        manifests[-1].write(directory)
    return manifests[-1]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read, in order."""
    found: list[Path] = []

    def verify_file(path: Path, entry: FileEntry) -> None:
        found.append(path)
        files.verify_file(path, entry)

    monkeypatch.setattr(verify_ahead, "verify_file", verify_file)
    return found


@pytest.fixture
def verify(saved: Manifest, tmp_path: Path) -> Iterator[Callable[[int], None]]:
    """Verifies the files of a step, all of the newest having been read ahead."""
    ahead = VerifyAhead("latest", tmp_path)
    for future in ahead._files.result().values():
        future.exception()

    def of_step(step: int) -> None:
        for name, entry in saved.files.items():
            ahead.verify(step_directory(tmp_path, step) / name, entry)

    yield of_step
    ahead.close()


def test_nothing_is_read_twice(
    read: list[Path], verify: Callable[[int], None], tmp_path: Path
) -> None:
    paths = [step_directory(tmp_path, 2) / name for name in NAMES]
    assert read == paths
    verify(2)
    assert read == paths
    for _ in range(2):  # another checkpoint is resumed from
        verify(1)
        assert read == paths + [step_directory(tmp_path, 1) / name for name in NAMES]


def test_a_file_that_has_changed_is_read_again(
    read: list[Path], verify: Callable[[int], None], tmp_path: Path
) -> None:
    path = step_directory(tmp_path, 2) / NAMES[1]
    content = path.read_bytes()
    path.write_bytes(content)
    verify(2)
    assert read[2:] == [path]
    flip_bit(path)
    with pytest.raises(CheckpointError, match=r"rank-00000\.pt: damaged: wrong CRC"):
        verify(2)


@pytest.mark.parametrize("wanted", ["none", "7", "nowhere"])
def test_what_is_not_there_is_told_in_its_turn(
    read: list[Path], saved: Manifest, tmp_path: Path, wanted: str
) -> None:
    ahead = VerifyAhead(wanted, tmp_path)
    assert ahead._files.result() == {} and read == []
    ahead.verify(step_directory(tmp_path, 2) / NAMES[0], saved.files[NAMES[0]])
    assert len(read) == 1
    ahead.close()


def test_damage_is_told_once_it_matters(saved: Manifest, tmp_path: Path) -> None:
    directory = step_directory(tmp_path, 1)
    flip_bit(directory / NAMES[0])
    ahead = VerifyAhead(str(directory), tmp_path)
    with pytest.raises(CheckpointError, match=r"shard\.pt: damaged: wrong CRC"):
        ahead.verify(directory / NAMES[0], saved.files[NAMES[0]])
    ahead.verify(directory / NAMES[1], saved.files[NAMES[1]])
    ahead.close()
