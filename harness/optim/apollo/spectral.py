"""P from the gradient itself, as in GaLore: a matrix's top singular vectors.

Zhao, Zhang, Chen, Wang, Anandkumar and Tian, "GaLore: Memory-Efficient LLM Training by Gradient
Low-Rank Projection", ICML 2024, arXiv 2403.03507. APOLLO's authors compare it with their random P
("APOLLO w. SVD"). Unlike a random P it must be stored and needs the complete gradient: at each
refresh, one of the ranks that share a matrix collects its gradient, computes P and broadcasts it.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from harness.optim.apollo.channels import ChannelPlan
from harness.waiting import in_collective
from harness.zero.shards import Shard

log = logging.getLogger(__name__)


def singular_vectors(channels: Tensor, rank: int) -> Tensor:
    """The top right singular vectors of a matrix (channels, inner), signed so that the largest
    entry of each is positive, and padded with zeros up to `rank`: fp32 (inner, rank)."""
    channels = channels.double()
    vectors = torch.linalg.eigh(channels.T @ channels).eigenvectors.flip(1)[:, :rank]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    missing = max(0, rank - vectors.shape[1])
    return torch.nn.functional.pad((vectors * largest.sign()).float(), (0, missing))


def new_projections(
    plan: ChannelPlan, shard: Shard, flat: int, rank: int, gradient_of: Callable[[int], Tensor]
) -> Tensor | None:
    """The new P of the flat's matrices that this rank has elements of, concatenated: fp32 (any,
    rank); None on all ranks if a gradient is not finite or a decomposition fails.

    `gradient_of` returns this rank's elements of a matrix's gradient, zeros elsewhere: (channels,
    inner). Collective where parameters are sharded; waits for the device.
    """
    projections: list[Tensor] = []
    is_complete = True
    for number in plan.matrices_of_flat[flat]:
        solver = plan.holders[number][0]
        partial = gradient_of(number)
        gradient = _exchanged(dist.reduce, partial, solver, shard)
        projection = gradient.new_full((plan.matrices[number].inner, rank), torch.nan)
        if solver == plan.rank and bool(gradient.isfinite().all()):
            try:
                projection = singular_vectors(gradient, rank)
            except RuntimeError as error:  # out of memory, LAPACK failed: the other ranks wait
                log.warning("%s keeps its old projection: %s", plan.matrices[number].name, error)
        projection = _exchanged(dist.broadcast, projection, solver, shard)
        is_complete &= not bool(projection.isnan().any())
        if plan.rank in plan.holders[number]:
            projections.append(projection)
    if not is_complete:
        return None
    return torch.cat(projections) if projections else torch.empty(0, rank)


def _exchanged(collective: Any, tensor: Tensor, solver: int, shard: Shard) -> Tensor:
    """A tensor after a collective to or from a rank of the shard's process group."""
    if shard.group is None:
        return tensor
    exchanged = tensor.to(shard.device).contiguous()  # LAPACK's results are column-major
    with in_collective:
        collective(exchanged, dist.get_global_rank(shard.group, solver), group=shard.group)
    return exchanged.to(tensor.device)
