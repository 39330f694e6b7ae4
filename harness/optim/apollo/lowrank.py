"""APOLLO's low-rank parts: project, adapt, apply, for all matrices of a parameter group at once.

The equations, and where they are from, stand at the top of apollo.py. Shapes: C slots of channels
(channels.py), of which the first c carry state on this rank; r the rank; W ranks; n matrices.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from harness.optim.apollo import named as named_state
from harness.optim.apollo.channels import Block, ChannelPlan, Matrix
from harness.optim.apollo.parts import Group, Named, Part, State
from harness.optim.apollo.philox import gaussian, key_of, rademacher
from harness.optim.apollo.spectral import refreshed
from harness.zero.shards import Shard

foreach: Any = torch
"""torch's functions on lists of tensors, which its type stubs do not tell of."""

PROJECTIONS = {"gaussian": gaussian, "rademacher": rademacher}

KEPT_BYTES = 64 * 2**20
"""Bytes of projections that an optimizer keeps until their refresh; more are made at each step."""


class LowRank(Part):
    """APOLLO, or with scale_type "tensor" APOLLO-Mini."""

    def __init__(
        self,
        flats: Sequence[Tensor],
        shards: Sequence[Shard],
        matrices: Mapping[str, Sequence[Matrix]],
        projections: "Projections",
    ):
        """`matrices`: those of every parameter, by its name."""
        super().__init__(flats, shards)
        self._kept = projections
        self.plan = ChannelPlan(shards, matrices)
        self.is_cut = self.plan.is_cut
        count = len(self.plan.matrices)
        self._matrix_of_slot = self.plan.matrix_of_slot.to(self.device)
        self._flat_of_matrix = torch.tensor(self.plan.flat_of_matrix, device=self.device)
        here = self._matrix_of_slot[: self.plan.rows_here]
        first = self.plan.rows_here + self.plan.rank * self.plan.chunk
        dealt = self._matrix_of_slot[first : first + self.plan.chunk]
        counts = [torch.bincount(slots, minlength=count + 1) for slots in (here, dealt)]
        self._channels_of = torch.cat(counts)  # rows of state by matrix: here whole, then dealt
        self._inner_of: dict[int, range] = {}  # the inner indices of a matrix that are needed here
        for block in self.plan.blocks:
            known, inner = self._inner_of.get(block.matrix, block.inner), block.inner
            first, stop = min(known.start, inner.start), max(known.stop, inner.stop)
            self._inner_of[block.matrix] = range(first, stop)
        self._is_written = not self.plan.shared and all(m.by_rows for m in self.plan.matrices)
        """Whether every channel's R comes from one block, and none is left out."""
        self._sketch = self._squares = self._ratios = torch.empty(0)
        self._told: dict[str, Tensor] = {}

    def _first_state(self, number: int) -> State:
        return named_state.first_state(self.plan, number, self.group, self.device)

    def begin(self, group: Group, states: list[State], named: Named) -> None:
        super().begin(group, states, named)
        for rows, state in zip(self.plan.rows_of_flat, states, strict=True):
            found, expected = tuple(state["exp_avg"].shape), (rows, group["rank"])
            if found != expected:
                raise ValueError(
                    f"state of {self.plan.matrices[0].name!r} and what is stepped with it: found "
                    f"the shape {found}, expected {expected}: it was saved with another `rank`, or "
                    "on another number of ranks or ZeRO stage: load it by name (load_named_state)"
                )
        if group["projection"] == "svd":
            self._refresh()

    def _refresh(self) -> None:
        """Makes the P of the flats where it is due, unless a gradient is not finite."""
        plan, rank = self.plan, self.group["rank"]
        for flat, state in enumerate(self.states):
            refresh = state["calls"] // self.group["update_proj_gap"]
            if "projection" not in state:  # the config had another projection so far
                fresh = self._first_state(flat)
                state |= {key: fresh[key] for key in ("projection", "made")}
            if state["made"] != refresh:
                made = refreshed(plan, self.shard, flat, rank, self._gradient)
                if made is not None:
                    state["projection"].copy_(made)
                    state["made"] = refresh

    def _gradient(self, number: int) -> Tensor:
        """What is here of a matrix's gradient, zeros elsewhere: (channels, inner)."""
        matrix = self.plan.matrices[number]
        whole = torch.zeros(matrix.channels, matrix.inner, device=self.device)
        for block in self.plan.blocks:
            if block.matrix == number:
                channels, inner = block.channels, block.inner
                here = whole[channels.start : channels.stop, inner.start : inner.stop]
                here.copy_(block.of(self.gradients))
        return whole

    def _projection(self, number: int) -> Tensor:
        """The rows of P that a matrix needs here."""
        plan, needed = self.plan, self._inner_of[number]
        state = self.states[plan.flat_of_matrix[number]]
        if self.group["projection"] == "svd":
            whole = state["projection"].narrow(0, *plan.projected[number])
            return whole[needed.start : needed.stop]
        matrix = plan.matrices[number]
        return self._kept.get(matrix, needed, state["calls"], self.group, self.device)

    def telemetry(self) -> dict[str, Tensor]:
        return self._told

    def named(self, states: Sequence[State]) -> Iterator[tuple[str, Tensor]]:
        for number, matrix in enumerate(self.plan.matrices):
            for key, value in named_state.of_matrix(self.plan, number, states).items():
                is_piece = key in named_state.PIECEWISE
                yield f"{matrix.name}/{key}", self._joined(value) if is_piece else value

    def _adopt(self, number: int, state: State, named: Named) -> None:
        for place, flat in enumerate(self.plan.flat_of_matrix):
            name, found = self.plan.matrices[place].name, {}
            for key in named_state.KEYS if flat == number else ():
                if (value := named.pop(f"{name}/{key}", None)) is not None:
                    found[key] = value
            if found:
                named_state.put(self.plan, place, state, found)

    def square_sum(self) -> Tensor:
        return self._squares.sum(dtype=torch.float64)

    def project(self) -> Tensor:
        plan, group = self.plan, self.group
        rank = group["rank"]
        is_written = self._is_written and group["scale_type"] == "channel"
        new = torch.empty if is_written else torch.zeros
        self._sketch = new(plan.slots, rank, device=self.device)
        self._squares = new(plan.slots, device=self.device)
        for number, blocks in groupby(plan.blocks, key=lambda block: block.matrix):
            needed, projection = self._inner_of[number], self._projection(number)
            for block in blocks:
                first = block.inner.start - needed.start
                is_all = len(block.inner) == len(needed)
                rows = projection if is_all else projection[first : first + len(block.inner)]
                self._project_block(block, rows)
        shared = [self._sketch[plan.rows_here :], self._squares[plan.rows_here :, None]]
        return torch.cat(shared, dim=1).view(plan.world, plan.chunk * (rank + 1))

    def _project_block(self, block: Block, projection: Tensor) -> None:
        """Adds a block's share to R and to the squares. `projection`: its rows of P."""
        channels, slots = block.of(self.gradients), block.slots
        sketch, squares = self._sketch[slots], self._squares[slots]
        by_rows = self.plan.matrices[block.matrix].by_rows
        if by_rows:  # what is here of a row is in this block
            torch.mm(channels, projection, out=sketch)
        else:
            sketch.addmm_(channels, projection)
        if self.group["scale_type"] == "tensor":  # only their sum is asked for
            squares[0] += torch.linalg.vector_norm(channels).square()
        elif by_rows:
            torch.linalg.vector_norm(channels, dim=1, out=squares).square_()
        else:  # torch's norm is slow along columns
            squares += channels.square().sum(1)

    def adapt(self, received: Tensor, all_finite: Tensor) -> Tensor:
        plan, group, rank = self.plan, self.group, self.group["rank"]
        dealt = received.view(plan.chunk, rank + 1)
        self._sketch[plan.rows_here : plan.rows] = dealt[:, :rank]
        self._squares[plan.rows_here : plan.rows] = dealt[:, rank]
        sketch = self._sketch[: plan.rows]
        squares = self._squares[: plan.rows].double()
        norms = torch.linalg.vector_norm(sketch, dim=1).double()
        adapted_norms = torch.linalg.vector_norm(self._adam(sketch, all_finite), dim=1).double()
        self._ratios = torch.ones_like(norms)
        if group["scale_type"] == "channel":
            self._ratios = adapted_norms / (norms + 1e-8)
        of_channel = torch.stack([self._ratios**2 * squares, norms**2, adapted_norms**2], dim=1)
        lengths = self._channels_of
        sums = torch.segment_reduce(  # whose checks of the lengths would wait for the device
            of_channel, "sum", lengths=lengths, axis=0, unsafe=True, initial=0
        )
        sums = sums.view(2, -1, 3).sum(0)[:-1]
        return torch.cat([self._ratios[plan.rows_here :], sums.flatten()])

    def apply(self, told: Tensor, all_finite: Tensor) -> None:
        plan, group = self.plan, self.group
        told = told.to(self.device)
        ratios = torch.cat([self._ratios[: plan.rows_here], told[:, : plan.chunk].flatten()])
        squares, norms, adapted = told[:, plan.chunk :].sum(0).view(-1, 3).unbind(1)  # (n,) each
        of_matrix = adapted.sqrt() / (norms.sqrt() + 1e-8)
        scale = of_matrix if group["scale_type"] == "tensor" else torch.ones_like(squares)
        alpha = math.sqrt(group["scale"])
        limit = self._limit(
            scale * squares.sqrt() * (alpha if group["scale_front"] else 1), all_finite
        )
        self._told = {"scale": of_matrix, "limited": limit > 1, "seen": norms > 0}
        decay = torch.where(all_finite, group["lr"] * group["weight_decay"], 0.0)
        rate = group["lr"] * alpha * self._corrections() * scale / limit * (1 - decay)
        rate = torch.cat([rate, rate.new_zeros(1)])[self._matrix_of_slot]
        step = torch.where(all_finite, ratios * rate, 0.0).float()[:, None]
        for block in plan.blocks:
            weight = block.of(self.weights)
            gradient = _if_well(block.of(self.gradients), all_finite)
            if group["weight_decay"]:  # not w *= 1 - decay, whose rounding goes one way each step
                weight.addcmul_(weight, decay, value=-1)
            weight.addcmul_(gradient, step[block.slots], value=-1)
        self.end()

    def end(self) -> None:
        super().end()
        self._sketch = self._squares = self._ratios = torch.empty(0)

    def _adam(self, sketch: Tensor, all_finite: Tensor) -> Tensor:
        """Brings M and V up to date, if all is well: N = M / (sqrt(V) + eps), or 0 if not: (c, r).

        In one pass by torch's fused Adam, of a weight of 0 after so many steps that no bias is left
        to be corrected.
        """
        adapted = torch.zeros_like(sketch)
        rows = self.plan.rows_of_flat
        beta1, beta2 = self.group["betas"]
        adam(
            list(adapted.split(rows)),
            list(sketch.split(rows)),
            [state["exp_avg"] for state in self.states],
            [state["exp_avg_sq"] for state in self.states],
            [],
            list(torch.full((len(rows),), 1e30, device=self.device)),
            fused=True,
            found_inf=(~all_finite).float(),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=-1.0,
            weight_decay=0.0,
            eps=self.group["eps"],
            maximize=False,
        )
        steps = [state["step"] for state in self.states]
        foreach._foreach_add_(steps, [all_finite.float()] * len(steps))
        for state in self.states:
            state["calls"] += 1
        return adapted

    def _corrections(self) -> Tensor:
        """sqrt(1 - b2^t) / (1 - b1^t) for every matrix, where t is the steps that counted: (n,)."""
        steps = torch.stack([state["step"] for state in self.states]).double()
        beta1, beta2 = self.group["betas"]
        return ((1 - beta2**steps).sqrt() / (1 - beta1**steps))[self._flat_of_matrix]

    def _limit(self, norms: Tensor, all_finite: Tensor) -> Tensor:
        """L for every matrix, from the norms of U: (n,). The first norm above 0 starts the limiter:
        one that had started at 0 would let nothing pass, ever."""
        gamma = self.group["gamma"]
        if gamma is None or gamma == math.inf:
            return torch.ones_like(norms)
        limiters = [state["limiter"] for state in self.states]
        last = torch.cat(limiters)
        growth = (norms / (last + 1e-8)).clamp(min=gamma) / gamma
        limit = torch.where(last > 0, growth, 1.0)
        last = torch.where(all_finite & (norms > 0), norms / limit, last).float()
        foreach._foreach_copy_(limiters, list(last.split([len(one) for one in limiters])))
        return limit


def _if_well(tensor: Tensor, all_finite: Tensor) -> Tensor:
    """A fp32 tensor, or zeros. (0 times what is not finite is not 0.) Only on a CPU, which does not
    wait for itself, is the flag read."""
    if tensor.device.type == "cpu":
        return tensor if all_finite else torch.zeros_like(tensor)
    return _masked(tensor, all_finite)


def _masked(tensor: Tensor, all_finite: Tensor) -> Tensor:
    """All bits of a fp32 tensor, or none."""
    return (tensor.view(torch.int32) & -all_finite.to(torch.int32)).view(torch.float32)


class Projections:
    """The matrices P of an optimizer: made from their address, and kept until their refresh as long
    as there is room."""

    def __init__(self) -> None:
        self._kept: dict[Any, tuple[Any, Tensor]] = {}
        self._bytes = 0

    def get(
        self, matrix: Matrix, inner: range, calls: int, group: Group, device: torch.device
    ) -> Tensor:
        """The rows of P for some inner indices of a matrix, entries from N(0, 1/r), or of that
        variance: fp32 (inner, r). `calls`: steps before this one."""
        rank, refresh = group["rank"], calls // group["update_proj_gap"]
        address = matrix.name, inner, rank
        contents = refresh, group["projection"], group["seed"]
        if address in self._kept:
            made_of, projection = self._kept[address]
            if made_of == contents:
                return projection
            del self._kept[address]
            self._bytes -= projection.nbytes
        make, key = PROJECTIONS[group["projection"]], key_of(group["seed"], matrix.name)
        projection = make(inner, range(rank), refresh, key, device).div_(math.sqrt(rank))
        if self._bytes + projection.nbytes <= KEPT_BYTES:
            self._kept[address] = contents, projection
            self._bytes += projection.nbytes
        return projection
