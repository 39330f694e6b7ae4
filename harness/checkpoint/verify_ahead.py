"""Checks the files that a run will most likely resume from while its engines are being built.

Reading a checkpoint to check its CRCs takes half as long as loading it, and needs neither Python
nor the device: a thread does it beside the model's construction. What it has not checked, or what
has changed since, is checked in its turn.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from harness.checkpoint.completeness import identity, needed_files
from harness.checkpoint.files import FileEntry, verify_file
from harness.checkpoint.manifest import read_manifest
from harness.checkpoint.resume_source import locate
from harness.convert.run_checkpoints import checkpoints_in, saved_at
from harness.errors import CheckpointError

_Checked = tuple[FileEntry, tuple[int, int]]
"""A file's entry in the manifest, and the file's identity before it was read."""


class VerifyAhead:
    """A thread that verifies this rank's share of the checkpoint that is probably resumed from.

    Not collective: this rank's disk may have another newest checkpoint than that of others, of
    which `choose_checkpoint` then knows better.
    """

    def __init__(self, wanted: str, *parents: Path):
        """Starts it. `wanted`: as for `choose_checkpoint`. `parents`: where this run's checkpoints
        may be."""
        self._thread = ThreadPoolExecutor(1, "verify-ahead")
        self._files = self._thread.submit(self._begin, wanted, parents)
        self._checked: dict[Path, _Checked] = {}

    def verify(self, path: Path, entry: FileEntry) -> None:
        """`verify_file`, at once if the file has been checked; waits for the thread if it is to."""
        ahead = self._files.result().pop(path, None)
        if ahead is not None and ahead.exception() is None:
            self._checked[path] = ahead.result()
        if self._checked.get(path) != (entry, identity(path)):
            self._checked[path] = _verified(path, entry)

    def close(self) -> None:
        """Nothing more is checked ahead."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _begin(self, wanted: str, parents: Sequence[Path]) -> dict[Path, "Future[_Checked]"]:
        try:
            directory = _probable(wanted, parents)
            if directory is None:
                return {}
            files, share = needed_files(read_manifest(directory))
        except (CheckpointError, OSError):  # which is reported when its turn comes
            return {}
        return {
            directory / name: self._thread.submit(_verified, directory / name, files[name])
            for name in share
        }


def _probable(wanted: str, parents: Sequence[Path]) -> Path | None:
    """The checkpoint that a run probably resumes from, if any. Raises CheckpointError, OSError."""
    if wanted == "none":
        return None
    if wanted != "latest":
        parent, is_parent = locate(wanted, parents[0])
        if not is_parent:
            return parent
        parents = [parent]
    newest = [path for parent in parents for path in checkpoints_in(parent)[:1]]
    return max(newest, key=saved_at, default=None)


def _verified(path: Path, entry: FileEntry) -> _Checked:
    before = identity(path)
    verify_file(path, entry)
    return entry, before
