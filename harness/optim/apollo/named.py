"""APOLLO's state of matrices by name, whole and in no layout: what moves it between layouts.

    exp_avg, exp_avg_sq    (channels, r), fp32
    limiter, step, calls   ()
    projection, made       (inner, r) and (), with projection "svd" only

A layout is a `ChannelPlan`: it says which channels' moments are in which rows of a flat's state.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from harness.optim.apollo.channels import ChannelPlan

log = logging.getLogger(__name__)

State = dict[str, Any]

PIECEWISE = ("exp_avg", "exp_avg_sq", "projection")
"""What a rank has of a matrix for a part; the rest it has whole."""
SPECTRAL = ("projection", "made")
"""What only "svd" has, which makes it of the next gradient where there is none yet."""
KEYS = ("exp_avg", "exp_avg_sq", "limiter", "step", "calls", *SPECTRAL)


def first_state(
    plan: ChannelPlan, flat: int, group: Mapping[str, Any], device: torch.device | None = None
) -> State:
    """The state of a flat before its first step, but for `step`. `group`: its settings."""
    rank = group["rank"]
    state: State = {
        "exp_avg": torch.zeros(plan.rows_of_flat[flat], rank, device=device),
        "exp_avg_sq": torch.zeros(plan.rows_of_flat[flat], rank, device=device),
        "limiter": torch.zeros(len(plan.matrices_of_flat[flat]), device=device),
        "calls": 0,
    }
    if group["projection"] == "svd":
        here = [plan.projected[n] for n in plan.matrices_of_flat[flat] if n in plan.projected]
        rows = sum(size for _, size in here)
        state |= {"projection": torch.zeros(rows, rank, device=device), "made": -1}
    return state


def of_matrix(plan: ChannelPlan, number: int, states: Sequence[State]) -> dict[str, Tensor]:
    """The state of a matrix by key, from those of the plan's flats: what is piecewise is 0 where
    another rank has it, so that the sum over the ranks is whole."""
    matrix, flat = plan.matrices[number], plan.flat_of_matrix[number]
    state = states[flat]
    found: dict[str, Tensor] = {}
    for key in ("exp_avg", "exp_avg_sq"):
        kept = state[key]
        found[key] = torch.zeros(matrix.channels, kept.shape[1], device=kept.device)
        for row, run in plan.kept[number]:
            found[key].narrow(0, run.channel, run.count).copy_(kept.narrow(0, row, run.count))
    found["limiter"] = state["limiter"][plan.matrices_of_flat[flat].index(number)]
    found["step"], found["calls"] = state["step"], torch.tensor(state["calls"])
    if "projection" in state:
        kept = state["projection"]
        found["projection"] = torch.zeros(matrix.inner, kept.shape[1], device=kept.device)
        if plan.holders[number][0] == plan.rank:
            found["projection"] = kept.narrow(0, *plan.projected[number])
        found["made"] = torch.tensor(state["made"])
    return found


def put(plan: ChannelPlan, number: int, state: State, found: Mapping[str, Tensor]) -> None:
    """Puts the state of a matrix into that of the flat that holds it.

    What is no state of APOLLO at this rank is told, and left alone: the matrix starts anew.
    """
    matrix, flat = plan.matrices[number], plan.flat_of_matrix[number]
    shape = matrix.channels, state["exp_avg"].shape[1]
    needed = state.keys() - SPECTRAL
    if any(key not in found for key in needed) or tuple(found["exp_avg"].shape) != shape:
        log.warning("%s: its state is not that of APOLLO at this rank; it starts anew", matrix.name)
        return
    for key in ("exp_avg", "exp_avg_sq"):
        for row, run in plan.kept[number]:
            whole = found[key].narrow(0, run.channel, run.count)
            state[key].narrow(0, row, run.count).copy_(whole)
    state["limiter"][plan.matrices_of_flat[flat].index(number)] = found["limiter"]
    state["step"].copy_(torch.maximum(state["step"], found["step"].to(state["step"].device)))
    state["calls"] = max(state["calls"], int(found["calls"]))
    if "projection" in state and "projection" in found:
        if number in plan.projected:
            state["projection"].narrow(0, *plan.projected[number]).copy_(found["projection"])
        state["made"] = int(found["made"])


def relay(
    old: Sequence[ChannelPlan], states: Sequence[State], new: ChannelPlan, state: State
) -> None:
    """Puts what the ranks of an old layout kept of the matrices of one flat, `states`, into a new
    layout's `state` of one flat; for the matrices that are in both."""
    numbers = {matrix.name: number for number, matrix in enumerate(old[0].matrices)}
    for number, matrix in enumerate(new.matrices):
        if matrix.name in numbers:
            parts = [
                of_matrix(plan, numbers[matrix.name], [kept])
                for plan, kept in zip(old, states, strict=True)
            ]
            whole = {
                key: torch.stack([part[key] for part in parts]).sum(0)
                if key in PIECEWISE
                else value
                for key, value in parts[0].items()
            }
            put(new, number, state, whole)
