"""Bytes that Muon and SOAP keep and send on each rank, computed from shapes."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

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
    total = [0] * world
    for rank in range(world):
        for group, plan, elements in _plans(groups, stage, world, rank):
            total[rank] += 4  # the step
            if plan is None:
                total[rank] += 2 * 4 * elements
            elif "ns_steps" in group:
                total[rank] += 4 * elements
            else:
                longest = group["max_precond_dim"]
                for number in soap_state.owned_matrices(plan):
                    shapes = soap_state.tensor_shapes(plan.matrices[number], longest)
                    total[rank] += sum(4 * rows * columns for rows, columns in shapes.values())
    return total


def sent_bytes(
    groups: Sequence[Mapping[str, Any]], stage: int, world: int, itemsize: int
) -> list[int]:
    """Bytes that each rank sends to others in a step: pieces to owners and back, in elements of
    `itemsize` bytes, without the one element a rank that says whether gradients are finite."""
    total = [0] * world
    for rank in range(world):
        for _, plan, _ in _plans(groups, stage, world, rank):
            if plan is not None:
                there = sum(piece.length for piece in plan.held if piece.owner != rank)
                back = sum(piece.length for piece in plan.owned if piece.holder != rank)
                total[rank] += itemsize * (there + back)
    return total


def _plans(
    groups: Sequence[Mapping[str, Any]], stage: int, world: int, rank: int
) -> Iterator[tuple[Mapping[str, Any], OwnerPlan | None, int]]:
    """For each tensor that a rank steps: its group, its plan (None: dense) and its elements."""
    load = [0.0] * world
    for group in groups:
        names = group["param_names"]
        shapes = {n: tuple(full_shape(p)) for n, p in zip(names, group["params"], strict=True)}
        for shard, elements in expected_shards(shapes, stage, world, rank):
            plan = None
            if not group["dense"]:
                matrices = {
                    segment.name: group_matrices(segment.name, shapes[segment.name], group)
                    for segment in shard.own
                }
                of_soap = partial(soap.cost_of, settings=dict(group))
                cost = muon.cost_of if "ns_steps" in group else of_soap
                plan = OwnerPlan(shard, matrices, cost, load if stage else [0.0])
            yield group, plan, elements
