"""Which saved tensors stay on the device: non-activations, and those that a copy would change."""

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
"""Autograd nodes that produce a cast or view of a parameter. (The output of an embedding, whose
only parent is also a parameter, is an activation.)"""


def must_stay(tensor: torch.Tensor, device_type: str) -> bool:
    """Whether a saved tensor must stay on the device, regardless of its size.

    True for tensors on other devices; parameters and their views, and casts of trained parameters
    (moving them frees nothing, and at ZeRO stage 3 DeepSpeed gathers them); tensor subclasses;
    sparse, lazily conjugated and negated tensors; tensors with several elements at one address.

    The cast of a frozen parameter has no graph that leads back to the parameter, so it is moved.
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
