"""The files of a checkpoint: written durably, told apart by a digest, verified without loading.

torch's files are zip archives that hold a CRC-32 of every tensor. The digest of a file is the
SHA-256 of its table of contents, CRCs included: made without reading the tensors back, and yet no
bit of them can change unseen.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch.utils._pytree import tree_map

from harness import distributed
from harness.errors import CheckpointError, FormatError
from harness.formats import zips
from harness.utils import tensor_leaves, torch_write


@contextmanager
def as_checkpoint_error(failure: str) -> Iterator[None]:
    """Turns an error of a file or a checkpoint into a CheckpointError "failure: ..."."""
    try:
        yield
    except (OSError, CheckpointError) as error:
        raise CheckpointError(f"{failure}: {error}") from None


class FileEntry(BaseModel):
    """What the manifest says of a file."""

    model_config = ConfigDict(extra="forbid")
    size: int
    """Bytes."""
    digest: str
    """SHA-256 of the archive's table of contents, in hex."""
    rank: int
    """Who wrote it."""


def write_file(state: Any, path: Path) -> FileEntry:
    """Writes a tree of tensors and plain values with torch.save, and syncs it to the disk.

    Raises OSError, which names `path`.
    """
    torch_write(state, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    size, digest = path.stat().st_size, zips.digest(path)
    return FileEntry(size=size, digest=digest, rank=distributed.global_rank())


def verify_file(path: Path, entry: FileEntry, read: bool = True) -> None:
    """Checks size and table of contents, and with `read` the CRC of every tensor.

    Raises CheckpointError that says what was found and what was expected.
    """
    try:
        zips.check(path, entry.size, entry.digest)
        for record in zips.records(path).values() if read else ():
            record.verify()
    except (FormatError, OSError) as error:
        raise CheckpointError(f"damaged: {error}") from None


def bytes_of(tree: Any) -> int:
    """Bytes of all tensors of a tree, shared memory counted once."""
    storages = [tensor.untyped_storage() for tensor in tensor_leaves(tree)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class Snapshots:
    """Copies of trees in CPU memory that no later step changes; shared memory stays shared.

    The memory of a copy is kept for the next one: it is paid for once, and no page of it is faulted
    in again. Pinned where there is a GPU.
    """

    def __init__(self) -> None:
        self._buffers: list[torch.UntypedStorage] = []

    def take(self, tree: Any) -> Any:
        """A copy of the tree. It overwrites the one before."""
        spare: dict[int, list[torch.UntypedStorage]] = {}
        for buffer in self._buffers:
            spare.setdefault(buffer.nbytes(), []).append(buffer)
        copies: dict[int, torch.UntypedStorage] = {}

        def copy(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return deepcopy(leaf)
            storage = leaf.untyped_storage()
            if storage.data_ptr() not in copies:
                fitting = spare.get(storage.nbytes())
                buffer = fitting.pop() if fitting else _buffer(storage.nbytes())
                copies[storage.data_ptr()] = buffer.copy_(storage)
            view = (leaf.storage_offset(), leaf.size(), leaf.stride())
            buffer = copies[storage.data_ptr()]
            return torch.empty(0, dtype=leaf.dtype).set_(buffer, *view)

        copied = tree_map(copy, tree)
        self._buffers = list(copies.values())
        return copied


def _buffer(size: int) -> torch.UntypedStorage:
    pin = torch.cuda.is_available()
    return torch.empty(size, dtype=torch.uint8, pin_memory=pin).untyped_storage()
