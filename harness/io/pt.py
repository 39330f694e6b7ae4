"""Reads `.pt` files as torch tensors, through `formats.pt_reader`, which runs no code."""

import zlib
from pathlib import Path
from typing import Any

import torch

from harness.errors import FormatError, first_few
from harness.files import write_atomically
from harness.formats import pt_reader
from harness.formats.json_tree import Keys, dotted
from harness.formats.pickled import describe
from harness.formats.pt_reader import Storage, TensorRef
from harness.io.mmap import ByteFile
from harness.io.structure import DTYPES
from harness.io.tree import LEFT_OUT, TreeConverter
from harness.utils import torch_write


def write(data: Any, path: Path) -> None:
    """Writes a structure that `pack` supports with torch.save, and checks that it can be read back.

    Raises FormatError if `read` would reject it, OSError if it cannot be written.
    """

    def write_staged(staged: Path) -> None:
        torch_write(data, staged)
        try:
            pt_reader.read(staged)
        except FormatError as error:
            reason = str(error).removeprefix(f"{staged}: ")
            raise FormatError(f"cannot be read back: {reason}") from None

    write_atomically(path, write_staged)


def read(
    path: Path, device: str | torch.device, lazy: bool, skipped: list[str] | None = None
) -> Any:
    """The structure in a file. Raises FormatError if it is damaged.

    Objects of unknown classes are an error; with `skipped` they are left out, each with a line in
    the list, unless nothing else is there. Checks the CRC of every tensor, except with `lazy`,
    which reads no tensor.
    """
    node = pt_reader.read(path)
    unknown: list[str] = []

    def leave_out(node: Any, keys: Keys) -> Any:
        unknown.append(
            f"{dotted(keys)!r} holds {describe(node)}" if keys else f"it holds {describe(node)}"
        )
        return LEFT_OUT

    with ByteFile(path, lazy) as file:
        reader = _TensorReader(file, device, check=not lazy)
        try:
            value = TreeConverter(reader.tensor, leave_out).value(node)
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
            raise FormatError(f"{path}: damaged: {error!r:.200}") from None
    if unknown and (skipped is None or value is LEFT_OUT):
        raise FormatError(
            f"{path}: {first_few(unknown)}: only plain values and tensors are loaded, since other "
            "classes can run code. If you trust the file: harness.io.load(..., unsafe=True)"
        )
    if skipped is not None:
        skipped += unknown
    return value


class _TensorReader:
    """Reads the tensors of a file; those that share memory share it again."""

    def __init__(self, file: ByteFile, device: str | torch.device, check: bool):
        self.file = file
        self.device = device
        self.check = check
        self.storages: dict[Storage, torch.UntypedStorage] = {}

    def tensor(self, ref: TensorRef) -> torch.Tensor:
        dtype = DTYPES[ref.dtype]
        if not ref.numel():
            tensor = torch.empty_strided(ref.shape, ref.stride, dtype=dtype, device=self.device)
        else:
            tensor = torch.empty(0, dtype=dtype, device=self.device)
            tensor.set_(self.storage(ref.storage), ref.offset, ref.shape, ref.stride)
        return tensor

    def storage(self, storage: Storage) -> torch.UntypedStorage:
        if storage not in self.storages:
            record = storage.record
            content = self.file.tensor(record.start, record.size, alignment=16)  # for any dtype
            if self.check:
                record.check_crc(zlib.crc32(content.numpy().data))
            self.storages[storage] = content.to(self.device).untyped_storage()
        return self.storages[storage]
