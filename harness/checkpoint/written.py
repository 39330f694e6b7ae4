"""Writes a file of a checkpoint durably; an error on one rank is an error on all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness import distributed
from harness.checkpoint.files import FileEntry
from harness.errors import CheckpointError
from harness.formats import zips
from harness.utils import write_durably


@contextmanager
def checkpoint_error_on_all_ranks(failure: str) -> Iterator[None]:
    """Turns an OSError or CheckpointError on any rank into a CheckpointError on all ranks:
    "failure: ..."."""
    with distributed.raise_on_all_ranks(failure), checkpoint_error(failure):
        yield


@contextmanager
def checkpoint_error(failure: str) -> Iterator[None]:
    """Turns an OSError or CheckpointError into a CheckpointError on this rank alone."""
    try:
        yield
    except (OSError, CheckpointError) as error:
        raise CheckpointError(f"{failure}: {error}") from None


def write_file(state: Any, path: Path) -> FileEntry:
    """Writes a tree of tensors and plain values with torch.save, and syncs it to the disk.

    Raises OSError, which names `path`.
    """
    write_durably(state, path)
    size, digest = path.stat().st_size, zips.digest(path)
    return FileEntry(size=size, digest=digest, rank=distributed.global_rank())
