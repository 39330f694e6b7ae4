"""P from the gradient itself, as GaLore has it: a matrix's top singular vectors.

Zhao, Zhang, Chen, Wang, Anandkumar and Tian, "GaLore: Memory-Efficient LLM Training by Gradient
Low-Rank Projection", ICML 2024, arXiv 2403.03507. APOLLO's authors compare it with their random P
("APOLLO w. SVD"). Unlike that one it has to be kept, and a matrix must be whole for it: at a
refresh, and only then, each matrix goes to one of the ranks that share it, and its P comes back.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from harness.optim.apollo.channels import ChannelPlan
from harness.zero.shards import Shard

log = logging.getLogger(__name__)


def singular_vectors(channels: Tensor, rank: int) -> Tensor:
    """The top right singular vectors of a matrix (channels, inner), the largest entry of each
    positive, and zeros where it has no more of them: fp32 (inner, rank)."""
    channels = channels.double()
    vectors = torch.linalg.eigh(channels.T @ channels).eigenvectors.flip(1)[:, :rank]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    missing = max(0, rank - vectors.shape[1])
    return torch.nn.functional.pad((vectors * largest.sign()).float(), (0, missing))


def refreshed(
    plan: ChannelPlan, shard: Shard, flat: int, rank: int, gradient_of: Callable[[int], Tensor]
) -> Tensor | None:
    """The new P of the flat's matrices that are here, one below the other: fp32 (any, rank).

    None, on all ranks, if a gradient is not finite, or no vectors are found. Collective where
    ranks share; waits for the device.

    `gradient_of` gives what is here of a matrix's gradient, zeros elsewhere: (channels, inner).
    """
    found: list[Tensor] = []
    is_well = True
    for number in plan.matrices_of_flat[flat]:
        maker = plan.holders[number][0]
        gradient = gradient_of(number)
        whole = _passed(dist.reduce, gradient, maker, shard)
        made = gradient.new_full((plan.matrices[number].inner, rank), torch.nan)
        if maker == plan.rank and bool(whole.isfinite().all()):
            try:
                made = singular_vectors(whole, rank)
            except RuntimeError as error:  # no memory, LAPACK gave up: the others wait
                log.warning("%s keeps its projection: %s", plan.matrices[number].name, error)
        made = _passed(dist.broadcast, made, maker, shard)
        is_well &= not bool(made.isnan().any())
        if plan.rank in plan.holders[number]:
            found.append(made)
    if not is_well:
        return None
    return torch.cat(found) if found else torch.empty(0, rank)


def _passed(collective: Any, tensor: Tensor, maker: int, shard: Shard) -> Tensor:
    """A tensor after a collective to or from a rank of the shard's group."""
    if shard.group is None:
        return tensor
    passed = tensor.to(shard.device).contiguous()  # LAPACK's are not, and would arrive turned
    collective(passed, dist.get_global_rank(shard.group, maker), group=shard.group)
    return passed.to(tensor.device)
