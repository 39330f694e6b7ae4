"""Buffers as they were before an engine's step, restored if the step is skipped.

A forward changes running statistics and codebooks before anything is known about its gradients, and
a NaN in them stays. Copied are the buffers that training changes, and small ones that it may yet
change, in one operation on the device for each dtype; and all of them in the first step, when it is
not known yet which these are.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from harness.engine.buffers import Buffers, layout_of
from harness.utils import may_overlap


class _Kept(NamedTuple):
    """A buffer of a module, and its copy."""

    owner: nn.Module
    key: str
    copy: Tensor


class KeptBuffers:
    """What one engine's step may change: its own buffers, and those of the models lent to it."""

    def __init__(self) -> None:
        self._kept: dict[Buffers, Mapping[str, _Kept]] = {}
        self._earlier: dict[Buffers, Mapping[str, _Kept]] = {}
        """Of the steps before, whose memory is used again."""

    def begin_step(self, own: Buffers) -> None:
        """Copies the engine's own buffers, before a step's first forward."""
        self._earlier |= self._kept
        self._kept = {}
        self.keep(own)

    @torch.no_grad()
    def keep(self, buffers: Buffers) -> None:
        """Copies buffers, unless this step has."""
        if buffers in self._kept:
            return
        found, earlier = buffers.changeable(), self._earlier.pop(buffers, {})
        kept: dict[str, _Kept] = {}
        pairs: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
        for name, (owner, key, tensor) in found.items():
            old = earlier.get(name)
            if old is None or old.copy.shape != tensor.shape or old.copy.dtype != tensor.dtype:
                old = _Kept(owner, key, torch.empty_like(tensor))
            kept[name] = old
            pairs[tensor.dtype][0].append(old.copy)
            pairs[tensor.dtype][1].append(tensor)
        for copies, tensors in pairs.values():
            torch._foreach_copy_(copies, tensors)  # pyright: ignore[reportPrivateImportUsage]
        self._kept[buffers] = kept

    @torch.no_grad()
    def restore(self) -> None:
        """Makes the buffers what they were. One that the step has registered stays."""
        for buffers, kept in self._kept.items():
            buffers.restored()
            for owner, key, copy in kept.values():
                tensor = owner._buffers.get(key)
                is_same = tensor is not None and layout_of(tensor) == layout_of(copy)
                if tensor is None or not is_same or may_overlap(tensor.shape, tensor.stride()):
                    owner._buffers[key] = copy.clone()
                else:
                    tensor.copy_(copy)
