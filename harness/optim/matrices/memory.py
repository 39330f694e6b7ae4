"""Bytes that Muon and SOAP keep and send on each rank, computed from shapes."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from harness.optim.apollo.channels import Matrix
from harness.optim.matrices import muon, soap, soap_state
from harness.optim.matrices.optimizer import group_matrices
from harness.optim.matrices.plan import OwnerPlan
from harness.optim.sharded.layouts import expected_shards
from harness.zero.parameters import full_shape


def state_bytes(groups: Sequence[Mapping[str, Any]], stage: int, world: int) -> list[int]:
    """Bytes of optimizer state per rank, for the parameter groups of `Muon` or `Soap`.

    Exact for DeepSpeed's default layout (at stage 3 except for the padding of several sub-groups).
    Parameters may be on the meta device.
    """
    alike = 0
    by_owner = [0] * (world if stage else 1)
    for group, plan, elements in _plans(groups, stage, world):
        alike += 4  # the step
        if plan is None:
            alike += 2 * 4 * elements
        elif "ns_steps" in group:
            alike += 4 * elements
        else:
            for matrix, owner in zip(plan.matrices, plan.owners, strict=True):
                shapes = soap_state.tensor_shapes(matrix, group["max_precond_dim"]).values()
                by_owner[owner] += sum(4 * rows * columns for rows, columns in shapes)
    total = [alike + own for own in by_owner]
    return total if stage else total * world


def sent_bytes(
    groups: Sequence[Mapping[str, Any]], stage: int, world: int, itemsize: int
) -> list[int]:
    """Bytes that each rank sends to others in a step: pieces to owners and back, in elements of
    `itemsize` bytes, without the one element a rank that says whether gradients are finite."""
    total = [0] * world
    for _, plan, _ in _plans(groups, stage, world):
        for piece in plan.pieces if plan is not None else ():
            if piece.holder != piece.owner:
                total[piece.holder] += itemsize * piece.length
                total[piece.owner] += itemsize * piece.length
    return total


def largest_matrix(groups: Sequence[Mapping[str, Any]]) -> int:
    """Elements of the largest matrix, which one rank computes."""
    sizes = [
        matrix.rows * matrix.columns
        for group in groups
        for matrices in ({} if group["dense"] else _matrices_of(group)).values()
        for matrix in matrices
    ]
    return max(sizes, default=0)


def _matrices_of(group: Mapping[str, Any]) -> dict[str, list[Matrix]]:
    """The matrices of each parameter of a group."""
    return {
        name: group_matrices(name, tuple(full_shape(parameter)), group)
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }


def _plans(
    groups: Sequence[Mapping[str, Any]], stage: int, world: int
) -> Iterator[tuple[Mapping[str, Any], OwnerPlan | None, int]]:
    """For each tensor that a rank steps: its group, its plan (None: dense) and its elements. The
    plans are rank 0's; all ranks' owners and pieces are the same."""
    load = [0.0] * (world if stage else 1)
    for group in groups:
        names = group["param_names"]
        shapes = {n: tuple(full_shape(p)) for n, p in zip(names, group["params"], strict=True)}
        matrices = {} if group["dense"] else _matrices_of(group)
        for shard, elements in expected_shards(shapes, stage, world, 0):
            plan = None
            if not group["dense"]:
                of_soap = partial(soap.cost_of, settings=dict(group))
                cost = muon.cost_of if "ns_steps" in group else of_soap
                plan = OwnerPlan(shard, matrices, cost, load)
            yield group, plan, elements
