"""Reads StoredTensors, and trees of tensor references, as torch tensors."""

from dataclasses import dataclass
from typing import Any

import torch

from harness.errors import FormatError
from harness.formats.json_tree import Keys, dotted
from harness.formats.pickled import Global, PickleError, Placeholder, check_size, describe
from harness.formats.raw_io import read_into
from harness.formats.stored_tensor import StoredTensor
from harness.io.tree import TreeConverter


@dataclass(frozen=True)
class GrownTensor:
    """A stored tensor with more rows."""

    stored: StoredTensor
    rows: int
    """All of them, at least as many as are stored."""
    row: torch.Tensor
    """Each of the new ones, of the stored rows' shape, flattened."""

    @property
    def dtype(self) -> str:
        """A key of `formats.dtypes.SIZES`."""
        return self.stored.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """With all rows."""
        return (self.rows, *self.stored.shape[1:])

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Elements `start` to `stop` of the flattened tensor. Raises as `read_tensor`."""
        size = self.stored.numel()
        old = read_tensor(self.stored, min(start, size), min(stop, size)).view(-1)
        places = torch.arange(max(start, size), max(stop, size)) - size
        return torch.cat([old, self.row[places % self.row.numel()].to(old.dtype)])


def read_tensor(
    tensor: StoredTensor, start: int = 0, stop: int | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The tensor, or elements `start` to `stop` of the flattened tensor, shape (elements,).

    `out`: what these elements are written into, and returned as, contiguous and of their number.
    Raises FormatError if the file was truncated, OSError if it cannot be read.
    """
    is_complete = stop is None and not start
    stop = tensor.numel() if stop is None else stop
    if out is not None and tensor.strided is None and out.dtype == getattr(torch, tensor.dtype):
        return _fill(out, tensor, start)
    if tensor.strided is not None:
        flat = _read_strided(tensor).reshape(-1)[start:stop]
    else:
        flat = _read_flat(tensor, start, stop)
    if out is not None:
        return out.copy_(flat)
    return flat.reshape(tensor.shape) if is_complete else flat


def _read_flat(tensor: StoredTensor, start: int, stop: int) -> torch.Tensor:
    flat = torch.empty(max(stop - start, 0), dtype=getattr(torch, tensor.dtype))
    return _fill(flat, tensor, start)


def _fill(flat: torch.Tensor, tensor: StoredTensor, start: int) -> torch.Tensor:
    """Reads elements from `start` on into all of `flat`, which is contiguous and on the CPU."""
    if flat.numel():
        view = flat.view(torch.uint8).numpy().data
        for range_ in tensor.cut(start * tensor.itemsize, len(view)):
            with range_.path.open("rb") as file:
                read_into(file, view[: range_.size], range_.start, range_.path)
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
    """A tree of `formats.pt_reader` with the values of torch and numpy in place of its references.

    An object of an unknown class remains a Placeholder, its contents replaced likewise:
    `placeholder_pickle` writes it as it was. Raises as `read_tensor` does, and FormatError for what
    cannot be written again.
    """

    def same(node: Any, keys: Keys) -> Any:
        if isinstance(node, Placeholder):
            return node.mapped(converter.value)
        if isinstance(node, Global) and node.can_be_named:
            return node
        raise FormatError(f"{dotted(keys)}: {describe(node)} cannot be written again")

    converter = TreeConverter(lambda ref: read_tensor(StoredTensor.from_ref(ref)), same)
    try:
        check_size(tree, inside=True)
        return converter.value(tree)
    except (PickleError, RecursionError) as error:
        raise FormatError(
            f"an object of an unknown class cannot be written again: {error}"
        ) from None
