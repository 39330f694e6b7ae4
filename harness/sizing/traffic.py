"""Bytes that a rank sends in a step, by collective, as rings send them."""

import torch
from torch.optim import Optimizer

from harness.optim.apollo import memory as apollo
from harness.optim.apollo.optimizer import Apollo
from harness.optim.matrices import memory as matrices
from harness.optim.matrices.optimizer import MatrixOptimizer
from harness.sizing.setting import Setting

EXACT_RANKS = 256
"""Up to so many ranks what optimizers exchange is computed from who has which part of a matrix. On
more it is estimated: for APOLLO the same as on this many; for Muon and SOAP that, divided, and at
least the largest matrix."""


REUSE = 1_000_000_000
"""DeepSpeed's stage3_max_reuse_distance, in elements: a parameter that is used again within it is
kept, so backward needs no second gather for those of the last half of it."""


def traffic_of(optimizer: Optimizer, setting: Setting) -> dict[str, int]:
    """Bytes that each rank sends in a step of an optimizer, by collective.

    Of the all-to-alls of Muon and SOAP, those of the rank that sends the most.
    """
    parameters = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    sent = ring_traffic(parameters, setting)
    if isinstance(optimizer, MatrixOptimizer):
        sent["all-to-all matrices"] = _of_matrices(optimizer, setting)
    if isinstance(optimizer, Apollo):
        world = min(setting.ranks, EXACT_RANKS)
        sketches, scales = apollo.sent_bytes(optimizer.param_groups, setting.stage, world)
        sent |= {"reduce-scatter sketches": sketches, "all-gather scales": scales}
    return sent


def ring_traffic(parameters: int, setting: Setting) -> dict[str, int]:
    """What DeepSpeed sends of gradients and weights, for so many trained parameters.

    A ring sends (N - 1) / N of the data for a gather or a scatter, twice that for an all-reduce.
    DeepSpeed reduces at the boundary at stages 0 and 1, in every micro-batch at 2 and 3; stages 1
    and 2 all-reduce (use_multi_rank_bucket_allreduce).
    """

    def ring(elements: int) -> int:
        return elements * setting.itemsize * (setting.ranks - 1) // setting.ranks

    times = setting.accumulation
    if setting.stage == 0:
        return {"all-reduce gradients": 2 * ring(parameters)}
    if setting.stage == 3:
        gathered = parameters + max(0, parameters - REUSE // 2)
        return {
            "all-gather weights": ring(gathered) * times,
            "reduce-scatter gradients": ring(parameters) * times,
        }
    reductions = times if setting.stage == 2 else 1
    return {
        "all-reduce gradients": 2 * ring(parameters) * reductions,
        "all-gather weights": ring(parameters),
    }


def _of_matrices(optimizer: MatrixOptimizer, setting: Setting) -> int:
    """Pieces of matrices to their owners and back, in the dtype of a GPU's computation."""
    itemsize = optimizer.dtype_on(torch.device("cuda")).itemsize
    groups, world = optimizer.param_groups, min(setting.ranks, EXACT_RANKS)
    most = max(matrices.sent_bytes(groups, setting.stage, world, itemsize))
    if world == setting.ranks:
        return most
    return max(most * world // setting.ranks, itemsize * matrices.largest_matrix(groups))
