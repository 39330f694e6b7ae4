"""Rank 0's tensors on every rank, over the group for tensors (NCCL on GPUs)."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from harness.distributed.world import device, is_global_leader
from harness.waiting import in_collective


@torch.no_grad()
def broadcast_tensors(tensors: Sequence[Tensor]) -> None:
    """Overwrites tensors by rank 0's, bit for bit, in one broadcast of all their bytes.

    Every rank passes tensors of the same shapes and dtypes, in the same order. Collective.
    """
    groups: dict[tuple[int, torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        key = (-tensor.element_size(), tensor.dtype, tensor.device)
        groups.setdefault(key, []).append(tensor)
    ordered = [groups[key] for key in sorted(groups, key=lambda key: key[0])]  # aligned parts
    flats = [_flatten_dense_tensors(group).view(torch.uint8).to(device()) for group in ordered]
    flat = torch.cat(flats)
    with in_collective:
        dist.broadcast(flat, src=0)
    if is_global_leader():
        return
    for group, part in zip(ordered, flat.split([f.numel() for f in flats]), strict=True):
        values = _unflatten_dense_tensors(part.view(group[0].dtype), group)
        torch._foreach_copy_(group, values)  # pyright: ignore[reportPrivateImportUsage]
