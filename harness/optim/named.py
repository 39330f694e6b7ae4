"""APOLLO's state of matrices by name, whole and in no layout: what moves it between layouts.

    exp_avg, exp_avg_sq    (channels, r), fp32
    limiter, step, calls   (), of the whole matrix

A layout is a `Plan`: it says which channels' moments are in which rows of a flat's state.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from harness.optim.channels import Plan

log = logging.getLogger(__name__)

State = dict[str, Any]

MOMENTS = ("exp_avg", "exp_avg_sq")
KEYS = (*MOMENTS, "limiter", "step", "calls")


def first_state(plan: Plan, flat: int, rank: int, device: torch.device | None = None) -> State:
    """The state of a flat of which nothing is known yet, but `step`. `rank`: r."""
    shape = plan.rows_of_flat[flat], rank
    return {
        "exp_avg": torch.zeros(shape, device=device),
        "exp_avg_sq": torch.zeros(shape, device=device),
        "limiter": torch.zeros(plan.flat_of_matrix.count(flat), device=device),
        "calls": 0,
    }


def of_matrix(plan: Plan, number: int, states: Sequence[State]) -> dict[str, Tensor]:
    """The state of a matrix by key, from those of the plan's flats: its moments are 0 where they
    are on other ranks, so that the sum over the ranks is whole."""
    matrix, flat = plan.matrices[number], plan.flat_of_matrix[number]
    state = states[flat]
    found: dict[str, Tensor] = {}
    for key in MOMENTS:
        kept = state[key]
        found[key] = torch.zeros(matrix.channels, kept.shape[1], device=kept.device)
        for row, run in plan.kept[number]:
            found[key].narrow(0, run.channel, run.count).copy_(kept.narrow(0, row, run.count))
    found["limiter"] = state["limiter"][plan.flat_of_matrix[:number].count(flat)]
    found["step"], found["calls"] = state["step"], torch.tensor(state["calls"])
    return found


def put(plan: Plan, number: int, state: State, found: dict[str, Tensor]) -> None:
    """Puts the state of a matrix into that of the flat that holds it.

    What is no state of APOLLO at this rank is told, and left alone: the matrix starts anew.
    """
    matrix, flat = plan.matrices[number], plan.flat_of_matrix[number]
    shape = matrix.channels, state["exp_avg"].shape[1]
    if any(key not in found for key in KEYS) or tuple(found["exp_avg"].shape) != shape:
        log.warning("%s: its state is not that of APOLLO at this rank; it starts anew", matrix.name)
        return
    for key in MOMENTS:
        for row, run in plan.kept[number]:
            whole = found[key].narrow(0, run.channel, run.count)
            state[key].narrow(0, row, run.count).copy_(whole)
    state["limiter"][plan.flat_of_matrix[:number].count(flat)] = found["limiter"]
    state["step"].copy_(torch.maximum(state["step"], found["step"].to(state["step"].device)))
    state["calls"] = max(state["calls"], int(found["calls"]))


def relay(old: Sequence[Plan], states: Sequence[State], new: Plan, state: State) -> None:
    """Puts what the ranks of an old layout kept of the matrices of one flat, `states`, into a new
    layout's `state` of one flat; for the matrices that are in both."""
    numbers = {matrix.name: number for number, matrix in enumerate(old[0].matrices)}
    for number, matrix in enumerate(new.matrices):
        if matrix.name in numbers:
            parts = [
                of_matrix(plan, numbers[matrix.name], [kept])
                for plan, kept in zip(old, states, strict=True)
            ]
            whole = parts[0] | {
                key: torch.stack([part[key] for part in parts]).sum(0) for key in MOMENTS
            }
            put(new, number, state, whole)
