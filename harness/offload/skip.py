"""Which tensors stay on the device: those that are not activations, or that a copy would change."""

from typing import Any

import torch
from torch import nn

from harness.utils import may_overlap
from harness.zero.parameters import is_sharded

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
"""Autograd nodes that make a cast or view of a parameter. (The output of an embedding, whose only
parent is a parameter as well, is an activation.)"""


def must_stay(tensor: torch.Tensor, device_type: str) -> bool:
    """Whether a saved tensor stays on the device, whatever its size.

    True of tensors on other devices; of parameters with their views, and casts of those that are
    trained (moving them frees nothing, and under ZeRO 3 DeepSpeed gathers them); of subclasses,
    sparse, lazily conjugated and negated tensors; of tensors with several elements at one place in
    memory.

    The cast of a frozen parameter has no graph that leads back to the parameter: it is moved.
    """
    return (
        type(tensor) is not torch.Tensor
        or tensor.device.type != device_type
        or tensor.layout is not torch.strided
        or is_sharded(tensor)
        or tensor.is_conj()
        or tensor.is_neg()
        or isinstance(tensor._base, nn.Parameter)
        or _is_cast_of_parameter(tensor.grad_fn)
        or (not tensor.is_contiguous() and may_overlap(tensor.shape, tensor.stride()))
    )


def _is_cast_of_parameter(node: Any) -> bool:
    while node is not None and node.name() in _CASTS_AND_VIEWS and len(node.next_functions) == 1:
        node = node.next_functions[0][0]
    return isinstance(getattr(node, "variable", None), nn.Parameter)
