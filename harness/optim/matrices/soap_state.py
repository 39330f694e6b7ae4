"""SOAP's state of one flat, which a rank keeps of the matrices that it owns; and by name.

    exp_avg, exp_avg_sq        in the rotated basis, fp32: (rows, columns) of each matrix
    left, left_basis           preconditioner and its eigenvectors, of sides up to max_precond_dim:
    right, right_basis         (side, side)
    step                       steps taken, ()
    calls, started             calls of step(); whether the bases have been computed
    owners                     the owner of each matrix, on whichever rank

The matrices' tensors are end to end, ordered by shape and then as in the flat, so that those of one
shape are one batch.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from harness.optim.apollo.channels import Matrix
from harness.optim.matrices.plan import OwnerPlan
from harness.optim.sharded.tensor_groups import ParamGroup, State

log = logging.getLogger(__name__)

COUNTERS = ("step", "calls", "started")
"""Entries that are numbers, alike on all ranks."""
BASES = ("left_basis", "right_basis")
KEYS = ("exp_avg", "exp_avg_sq", "left", "right", *BASES, *COUNTERS)


def tensor_shapes(matrix: Matrix, longest: int) -> dict[str, tuple[int, int]]:
    """The shapes of a matrix's tensors by key."""
    shape = matrix.rows, matrix.columns
    shapes = {"exp_avg": shape, "exp_avg_sq": shape}
    for key, side in (("left", matrix.rows), ("right", matrix.columns)):
        if side <= longest:
            shapes |= {key: (side, side), f"{key}_basis": (side, side)}
    return shapes


def owned_matrices(plan: OwnerPlan) -> list[int]:
    """The numbers of this rank's own matrices, in the order of their state."""
    own = [number for number, owner in enumerate(plan.owners) if owner == plan.rank]
    return sorted(own, key=lambda n: (plan.matrices[n].rows, plan.matrices[n].columns, n))


def views(plan: OwnerPlan, state: State, longest: int) -> dict[int, dict[str, Tensor]]:
    """The tensors of each of this rank's own matrices, by its number."""
    shapes = {n: tensor_shapes(plan.matrices[n], longest) for n in owned_matrices(plan)}
    found: dict[int, dict[str, Tensor]] = {number: {} for number in shapes}
    for key in KEYS:
        sizes = {n: of[key][0] * of[key][1] for n, of in shapes.items() if key in of}
        if key not in COUNTERS:
            parts = state[key].split([*sizes.values()]) if sizes else []
            for number, part in zip(sizes, parts, strict=True):
                found[number][key] = part.view(shapes[number][key])
    return found


def initial_state(
    plan: OwnerPlan, settings: ParamGroup, device: torch.device | None = None
) -> State:
    """The initial state of a flat, except `step`: zeros, and the identity for bases."""
    longest = settings["max_precond_dim"]
    own = [tensor_shapes(plan.matrices[number], longest) for number in owned_matrices(plan)]
    state: State = {"calls": 0, "started": 0, "owners": list(plan.owners)}
    for key in KEYS:
        if key not in COUNTERS:
            size = sum(of[key][0] * of[key][1] for of in own if key in of)
            state[key] = torch.zeros(size, device=device)
    for tensors in views(plan, state, longest).values():
        for key in BASES:
            if key in tensors:
                tensors[key].fill_diagonal_(1)
    return state


def of_matrix(plan: OwnerPlan, number: int, state: State, longest: int) -> dict[str, Tensor]:
    """The state of a matrix by key; tensors are 0 where another rank owns it, so that their sum
    over the ranks is complete."""
    matrix = plan.matrices[number]
    own = views(plan, state, longest).get(number, {})
    entries = {
        key: own[key] if key in own else torch.zeros(shape, device=state["exp_avg"].device)
        for key, shape in tensor_shapes(matrix, longest).items()
    }
    return entries | {key: torch.as_tensor(state[key]) for key in COUNTERS}


def fill_matrix(
    plan: OwnerPlan, number: int, state: State, entries: Mapping[str, Tensor], longest: int
) -> None:
    """Writes the state of a matrix into the state of its flat.

    If `entries` are not SOAP's with these preconditioners, logs a warning and leaves the initial
    state.
    """
    matrix = plan.matrices[number]
    shapes = tensor_shapes(matrix, longest)
    needed = {*shapes, *COUNTERS}
    if entries.keys() != needed or any(tuple(entries[k].shape) != s for k, s in shapes.items()):
        log.warning(
            "%s: reset: the loaded state is not SOAP's at this max_precond_dim", matrix.name
        )
        return
    for key, tensor in views(plan, state, longest).get(number, {}).items():
        tensor.copy_(entries[key])
    fill_counters(state, entries)


def fill_counters(state: State, entries: Mapping[str, Any]) -> None:
    """Writes the counters of a matrix into the state of its flat."""
    step = entries["step"].to(state["step"].device)
    state["step"].copy_(torch.maximum(state["step"], step))
    for key in ("calls", "started"):
        state[key] = max(state[key], int(entries[key]))


def reshard(
    old: OwnerPlan,
    saved: State,
    read: Callable[[State], State],
    new: OwnerPlan,
    state: State,
    longest: int,
) -> None:
    """Writes a flat's state on one rank of an old layout into `state`, a flat's state in a new
    layout, for the matrices that are in both. `read` brings `saved` into memory, if it is needed.
    """
    numbers = {matrix.name: number for number, matrix in enumerate(new.matrices)}
    moved = {n: numbers.get(old.matrices[n].name) for n in owned_matrices(old)}
    if any(to is not None and new.owners[to] == new.rank for to in moved.values()):
        saved = read(saved)
    elif old.rank == 0:  # what all ranks count
        fill_counters(state, read({key: saved[key] for key in COUNTERS}))
        return
    else:
        return
    for number, to in moved.items():
        if to is not None:
            fill_matrix(new, to, state, of_matrix(old, number, saved, longest), longest)
