"""Which tensors stay on the device: what is no activation, and what a copy could not give back."""

from typing import Any

import torch
from torch import nn

_CASTS_AND_VIEWS = {
    "AliasBackward0",
    "AsStridedBackward0",
    "CloneBackward0",
    "DetachBackward0",
    "PermuteBackward0",
    "ReshapeAliasBackward0",
    "SliceBackward0",
    "SplitBackward0",
    "SqueezeBackward0",
    "SqueezeBackward1",
    "TBackward0",
    "ToCopyBackward0",
    "TransposeBackward0",
    "UnsafeViewBackward0",
    "UnsqueezeBackward0",
    "ViewBackward0",
}
"""Nodes of the graph that lead from a parameter to another form of it. (An embedding, whose only
parent is a parameter as well, is an activation.)"""


def must_stay(tensor: torch.Tensor, device_type: str) -> bool:
    """Whether a saved tensor is not to be moved, whatever its size.

    Other devices; parameters with their views, and casts of those that are trained (moving them
    frees nothing, and under ZeRO 3 they are the engine's to gather); subclasses, sparse, lazily
    conjugated and negated tensors; tensors of which several elements share a place in memory.

    The cast of a frozen parameter has no graph that tells where it came from: it is moved.
    """
    return (
        type(tensor) is not torch.Tensor
        or tensor.device.type != device_type
        or tensor.layout is not torch.strided
        or hasattr(tensor, "ds_id")
        or tensor.is_conj()
        or tensor.is_neg()
        or isinstance(tensor._base, nn.Parameter)
        or _is_cast_of_parameter(tensor.grad_fn)
        or _overlaps(tensor)
    )


def _is_cast_of_parameter(node: Any) -> bool:
    while node is not None and node.name() in _CASTS_AND_VIEWS and len(node.next_functions) == 1:
        node = node.next_functions[0][0]
    return isinstance(getattr(node, "variable", None), nn.Parameter)


def _overlaps(tensor: torch.Tensor) -> bool:
    """Whether two elements may share a place; in doubt, yes."""
    if tensor.is_contiguous():
        return False
    end = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= end:
                return True
            end += stride * (size - 1)
    return False
