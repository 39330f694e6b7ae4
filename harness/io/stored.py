"""Reads StoredTensors, and trees of tensor references, as torch tensors."""

from typing import Any

import torch

from harness.formats.pt_reader import DType, Shape, TensorRef
from harness.formats.raw_io import read_into
from harness.formats.stored_tensor import StoredTensor


def read_tensor(tensor: StoredTensor, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """The tensor, or elements `start` to `stop` of the flattened tensor, shape (elements,).

    Raises FormatError if the file was truncated, OSError if it cannot be read.
    """
    is_complete = stop is None and not start
    if tensor.strided is not None:
        flat = _read_strided(tensor).reshape(-1)[start:stop]
    else:
        flat = _read_flat(tensor, start, tensor.numel() if stop is None else stop)
    return flat.reshape(tensor.shape) if is_complete else flat


def _read_flat(tensor: StoredTensor, start: int, stop: int) -> torch.Tensor:
    flat = torch.empty(max(stop - start, 0), dtype=getattr(torch, tensor.dtype))
    if flat.numel():
        view = flat.view(torch.uint8).numpy().data
        for range_ in tensor.cut(start * tensor.itemsize, len(view)):
            with range_.path.open("rb") as file:
                read_into(file.fileno(), view[: range_.size], range_.start, range_.path)
            view = view[range_.size :]
    return flat


def _read_strided(tensor: StoredTensor) -> torch.Tensor:
    ref = tensor.strided
    assert ref is not None
    (extent,) = tensor.ranges
    count = extent.size // ref.itemsize
    flat = _read_flat(StoredTensor(tensor.dtype, (count,), tensor.ranges), 0, count)
    return flat.as_strided(ref.shape, ref.stride).contiguous()


def materialize(tree: Any) -> Any:
    """A tree of `formats.pt_reader` with torch values in place of its references.

    Raises as `read_tensor` does.
    """
    match tree:
        case TensorRef():
            return read_tensor(StoredTensor.from_ref(tree))
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
