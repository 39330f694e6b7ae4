"""APOLLO's state by matrix name, complete and layout-independent, to move it between layouts.

    exp_avg, exp_avg_sq    (channels, r), fp32
    limiter, step, calls   ()
    projection, made       (inner, r) and (), only with projection "svd"

A `ChannelPlan` describes a layout: it maps channels to rows of a flat's state.
"""

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from harness.optim.apollo.channels import ChannelPlan
from harness.optim.apollo.tensor_groups import ParamGroup, State

log = logging.getLogger(__name__)

PARTIAL = ("exp_avg", "exp_avg_sq", "projection")
"""Entries of which a rank has only its own rows of a matrix, and 0 in the others."""
SPECTRAL = ("projection", "made")
"""Entries that only "svd" has; where they are missing it computes them from the next gradient."""
KEYS = ("exp_avg", "exp_avg_sq", "limiter", "step", "calls", *SPECTRAL)


def initial_state(
    plan: ChannelPlan, flat: int, settings: ParamGroup, device: torch.device | None = None
) -> State:
    """The initial state of a flat, except `step`."""
    rank = settings["rank"]
    state: State = {
        "exp_avg": torch.zeros(plan.rows_of_flat[flat], rank, device=device),
        "exp_avg_sq": torch.zeros(plan.rows_of_flat[flat], rank, device=device),
        "limiter": torch.zeros(len(plan.matrices_of_flat[flat]), device=device),
        "calls": 0,
    }
    if settings["projection"] == "svd":
        numbers = plan.matrices_of_flat[flat]
        rows = sum(size for n, (_, size) in plan.projection_rows.items() if n in numbers)
        state |= {"projection": torch.zeros(rows, rank, device=device), "made": -1}
    return state


def of_matrix(plan: ChannelPlan, number: int, states: Sequence[State]) -> dict[str, Tensor]:
    """The state of a matrix by key, from the states of the plan's flats. PARTIAL entries are 0 in
    rows that another rank has, so that their sum over the ranks is complete."""
    matrix, flat = plan.matrices[number], plan.flat_of_matrix[number]
    state = states[flat]
    entries: dict[str, Tensor] = {}
    for key in ("exp_avg", "exp_avg_sq"):
        own = state[key]
        entries[key] = torch.zeros(matrix.channels, own.shape[1], device=own.device)
        for row, channels in plan.owned_of_matrix[number]:
            rows = own.narrow(0, row, channels.count)
            entries[key].narrow(0, channels.channel, channels.count).copy_(rows)
    entries["limiter"] = state["limiter"][plan.matrices_of_flat[flat].index(number)]
    entries["step"], entries["calls"] = state["step"], torch.tensor(state["calls"])
    if "projection" in state:
        own = state["projection"]
        entries["projection"] = torch.zeros(matrix.inner, own.shape[1], device=own.device)
        if plan.holders[number][0] == plan.rank:
            entries["projection"] = own.narrow(0, *plan.projection_rows[number])
        entries["made"] = torch.tensor(state["made"])
    return entries


def fill_matrix(
    plan: ChannelPlan, number: int, state: State, entries: Mapping[str, Tensor]
) -> None:
    """Writes the state of a matrix into the state of its flat.

    If `entries` are not APOLLO's at this `rank`, logs a warning and leaves the initial state.
    """
    matrix, flat = plan.matrices[number], plan.flat_of_matrix[number]
    shape = matrix.channels, state["exp_avg"].shape[1]
    needed = state.keys() - SPECTRAL
    if any(key not in entries for key in needed) or tuple(entries["exp_avg"].shape) != shape:
        log.warning("%s: reset: the loaded state is not APOLLO's at this rank", matrix.name)
        return
    for key in ("exp_avg", "exp_avg_sq"):
        for row, channels in plan.owned_of_matrix[number]:
            rows = entries[key].narrow(0, channels.channel, channels.count)
            state[key].narrow(0, row, channels.count).copy_(rows)
    state["limiter"][plan.matrices_of_flat[flat].index(number)] = entries["limiter"]
    step = entries["step"].to(state["step"].device)
    state["step"].copy_(torch.maximum(state["step"], step))
    state["calls"] = max(state["calls"], int(entries["calls"]))
    if "projection" in state and "projection" in entries:
        if number in plan.projection_rows:
            own = state["projection"].narrow(0, *plan.projection_rows[number])
            own.copy_(entries["projection"])
        state["made"] = int(entries["made"])


def reshard(
    old: Sequence[ChannelPlan], states: Sequence[State], new: ChannelPlan, state: State
) -> None:
    """Writes `states`, one flat's state on each rank of an old layout, into `state`, a flat's state
    in a new layout, for the matrices that are in both."""
    numbers = {matrix.name: number for number, matrix in enumerate(old[0].matrices)}
    for number, matrix in enumerate(new.matrices):
        if matrix.name in numbers:
            by_rank = [
                of_matrix(plan, numbers[matrix.name], [own])
                for plan, own in zip(old, states, strict=True)
            ]
            entries = {
                key: torch.stack([part[key] for part in by_rank]).sum(0)
                if key in PARTIAL
                else value
                for key, value in by_rank[0].items()
            }
            fill_matrix(new, number, state, entries)
