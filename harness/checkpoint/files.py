"""The files of a checkpoint: written durably, told apart by a digest, verified without loading.

torch's files are zip archives that hold a CRC-32 of every tensor. The digest of a file is the
SHA-256 of its table of contents, CRCs included: made without reading the tensors back, and yet no
bit of them can change unseen.
"""

import hashlib
import os
import zipfile
import zlib
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch.utils._pytree import tree_map

from harness.errors import CheckpointError
from harness.utils import tensor_leaves


class FileEntry(BaseModel):
    """What the manifest says of a file."""

    model_config = ConfigDict(extra="forbid")
    size: int
    """Bytes."""
    digest: str
    """SHA-256 of the archive's table of contents, in hex."""


def write_file(state: Any, path: Path) -> FileEntry:
    """Writes a tree of tensors and plain values with torch.save, and syncs it to the disk."""
    try:
        torch.save(state, path)
    except RuntimeError as error:  # how torch's zip writer reports a full disk
        raise OSError(f"{path}: {str(error).splitlines()[0]}") from error
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return FileEntry(size=path.stat().st_size, digest=_digest(path))


def verify_file(path: Path, entry: FileEntry, read: bool = True) -> None:
    """Checks size and table of contents, and with `read` the CRC of every tensor.

    Raises CheckpointError that says what was found and what was expected.
    """
    if not path.is_file():
        raise CheckpointError(f"damaged: {path} is missing")
    if (size := path.stat().st_size) != entry.size:
        raise CheckpointError(f"damaged: {path} has {size} bytes, expected {entry.size}")
    try:
        if _digest(path) != entry.digest:
            raise CheckpointError(f"damaged: {path} is another file than the one that was saved")
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip() if read else None
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError) as error:
        raise CheckpointError(f"damaged: {path}: {error}") from None
    if damaged:
        raise CheckpointError(f"damaged: {path}: wrong CRC of {damaged}")


def _digest(path: Path) -> str:
    with zipfile.ZipFile(path) as archive:
        table = [(item.filename, item.file_size, item.CRC) for item in archive.infolist()]
    return hashlib.sha256(repr(table).encode()).hexdigest()


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def bytes_of(tree: Any) -> int:
    """Bytes of all tensors of a tree, shared memory counted once."""
    storages = [tensor.untyped_storage() for tensor in tensor_leaves(tree)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def snapshot(tree: Any) -> Any:
    """A copy of a tree in CPU memory that no later step changes; shared memory stays shared."""
    copies: dict[int, torch.UntypedStorage] = {}

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return deepcopy(leaf)
        storage = leaf.untyped_storage()
        address = storage.data_ptr()
        if address not in copies:
            copies[address] = storage.clone() if leaf.device.type == "cpu" else storage.cpu()
        view = (leaf.storage_offset(), leaf.size(), leaf.stride())
        return torch.empty(0, dtype=leaf.dtype).set_(copies[address], *view)

    return tree_map(copy, tree)
