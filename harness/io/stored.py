"""What lies in files, as torch's tensors."""

import os
from typing import Any

import torch

from harness.errors import FormatError
from harness.formats.dtypes import SIZES
from harness.formats.pt_reader import DType, Shape, TensorRef
from harness.formats.sources import StoredTensor, source


def read(tensor: StoredTensor, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Elements `start` to `stop` of a flattened tensor: (elements,); all of it in its own shape.

    Raises FormatError if the file has become shorter, OSError if it cannot be read.
    """
    dtype = getattr(torch, tensor.dtype)
    if tensor.strided is not None:
        return (
            _read_strided(tensor, dtype)
            .reshape(-1)[start:stop]
            .reshape(tensor.shape if stop is None and not start else (-1,))
        )
    width = SIZES[tensor.dtype]
    last = tensor.numel() if stop is None else stop
    flat = torch.empty(max(last - start, 0), dtype=dtype)
    if flat.numel():
        view = flat.view(torch.uint8).numpy().data
        at = 0
        for stretch in tensor.cut(start * width, flat.numel() * width):
            with stretch.path.open("rb") as file:
                _fill(file.fileno(), view[at : at + stretch.size], stretch.start, stretch.path)
            at += stretch.size
    return flat.reshape(tensor.shape) if stop is None and not start else flat


def _read_strided(tensor: StoredTensor, dtype: torch.dtype) -> torch.Tensor:
    ref = tensor.strided
    assert ref is not None
    (whole,) = tensor.ranges
    flat = read(StoredTensor(tensor.dtype, (whole.size // ref.itemsize,), tensor.ranges))
    return flat.as_strided(ref.shape, ref.stride).contiguous()


def _fill(file: int, view: memoryview, start: int, path: Any) -> None:
    while view:
        got = os.preadv(file, [view], start)
        if not got:
            raise FormatError(f"{path}: has become shorter")
        view, start = view[got:], start + got


def materialize(tree: Any) -> Any:
    """A tree of `formats.pickles` with torch's values in the places of its references.

    Raises as `read` does.
    """
    match tree:
        case TensorRef():
            return read(source(tree))
        case DType():
            return getattr(torch, tree.name)
        case Shape():
            return torch.Size(tree)
        case dict():
            return {key: materialize(value) for key, value in tree.items()}
        case list():
            return [materialize(value) for value in tree]
        case tuple():
            return tuple(materialize(value) for value in tree)
    return tree
