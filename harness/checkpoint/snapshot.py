"""Copies of live tensors in CPU memory, which a save in the background writes."""

import itertools
import weakref
from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch.utils._pytree import tree_map

from harness import devices
from harness.utils import tensor_leaves


def bytes_of(tree: Any) -> int:
    """Bytes of all tensors of a tree; shared storages are counted once."""
    return sum(storage_sizes(tree))


def storage_sizes(tree: Any) -> list[int]:
    """Bytes of each storage of a tree's tensors."""
    storages = [tensor.untyped_storage() for tensor in tensor_leaves(tree)]
    return list({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class Snapshots:
    """Copies of trees in CPU memory that no later step changes; shared storages stay shared.

    The memory of a copy is reused for the next one, which avoids allocation and page faults. It is
    pinned if there is a GPU.
    """

    def __init__(self) -> None:
        self._buffers: list[torch.UntypedStorage] = []
        # Pages that are freed while they are pinned would be copied to and from at their address.
        weakref.finalize(self, _unpin_all, self._buffers).atexit = False

    def reserve(self, sizes: Sequence[int]) -> None:
        """Memory for storages of these sizes, unless a copy was taken. May run in a thread, before
        the first copy."""
        if not self._buffers:
            self._buffers += [_buffer(size) for size in sizes]
            for buffer in self._buffers:
                torch.empty(0, dtype=torch.uint8).set_(buffer).zero_()  # the system gives it now

    def take(self, tree: Any) -> Any:
        """A copy of the tree. It overwrites the previous one."""
        spare: dict[int, list[torch.UntypedStorage]] = {}
        for buffer in self._buffers:
            spare.setdefault(buffer.nbytes(), []).append(buffer)
        copies: dict[int, torch.UntypedStorage] = {}

        def copy(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return deepcopy(leaf)
            storage = leaf.untyped_storage()
            key = storage._cdata  # not its address: that of all empty ones is 0
            if key not in copies:
                reusable = spare.get(storage.nbytes())
                buffer = reusable.pop() if reusable else _buffer(storage.nbytes())
                copies[key] = buffer.copy_(storage)
            view = (leaf.storage_offset(), leaf.size(), leaf.stride())
            buffer = copies[key]
            return torch.empty(0, dtype=leaf.dtype).set_(buffer, *view)

        copied = tree_map(copy, tree)
        self._buffers[:] = copies.values()
        _unpin_all(itertools.chain(*spare.values()))
        return copied


def _unpin_all(buffers: Iterable[torch.UntypedStorage]) -> None:
    for buffer in buffers:
        devices.unpin(buffer)


def _buffer(size: int) -> torch.UntypedStorage:
    if not (size and devices.is_gpu_used()):
        return torch.UntypedStorage(size)
    buffer = devices.separate_pages(size).untyped_storage()
    devices.pin(buffer)
    return buffer
