"""APOLLO's low-rank groups: project, adapt, apply, for all matrices of a parameter group together.

The equations and their sources are at the top of optimizer.py. Shapes: C channel slots
(channels.py), of which the first c have their state on this rank; r the rank; W ranks; n matrices.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from harness.devices import limits
from harness.optim.apollo import named_state
from harness.optim.apollo.channels import ChannelPlan, Matrix, Tile
from harness.optim.apollo.projections import Projections
from harness.optim.apollo.spectral import new_projections
from harness.optim.apollo.tensor_groups import NamedState, ParamGroup, State, TensorGroup
from harness.optim.sharded.tensor_groups import drop_others
from harness.zero.shards import Shard

foreach: Any = torch
"""torch's functions on lists of tensors, which its type stubs lack."""


class LowRank(TensorGroup):
    """APOLLO or, with scale_type "tensor", APOLLO-Mini."""

    def __init__(
        self,
        flats: Sequence[Tensor],
        shards: Sequence[Shard],
        matrices: Mapping[str, Sequence[Matrix]],
        projections: Projections,
        kernels: Any = None,
    ):
        """`matrices`: the matrices of each parameter, by parameter name. `kernels`: the module, if
        the update is to be fused."""
        super().__init__(flats, shards)
        self._projections = projections
        self.plan = ChannelPlan(shards, matrices, limits(self.device).tile_elements)
        self._fused_update: Any = None
        if kernels:
            by_rows = [self.plan.matrices[tile.matrix].by_rows for tile in self.plan.tiles]
            self._fused_update = kernels.Update(self.plan.tiles, by_rows, self.device)
        self.is_cut = self.plan.is_cut
        self._matrix_of_slot = self.plan.matrix_of_slot.to(self.device)
        self._flat_of_matrix = torch.tensor(self.plan.flat_of_matrix, device=self.device)
        self._channels_of = self._count_channels()
        self._tiles_of: dict[int, list[Tile]] = {}
        """By matrix."""
        for tile in self.plan.tiles:
            self._tiles_of.setdefault(tile.matrix, []).append(tile)
        self._matrices_with: dict[range, list[int]] = {}
        """By the inner indices that this rank has elements of."""
        for number, tiles in self._tiles_of.items():
            start = min(tile.inner.start for tile in tiles)
            stop = max(tile.inner.stop for tile in tiles)
            self._matrices_with.setdefault(range(start, stop), []).append(number)
        self._has_rows = torch.tensor(
            [*(matrix.by_rows for matrix in self.plan.matrices), False], device=self.device
        )[self._matrix_of_slot]
        """Whether the channel of a slot is a row."""
        self._is_written = not self.plan.shared and all(m.by_rows for m in self.plan.matrices)
        """Whether each channel's R is written by exactly one tile, so that none needs zeroing."""
        self._sketch = self._squares = self._ratios = torch.empty(0)
        self._step_metrics: dict[str, Tensor] = {}

    def _count_channels(self) -> Tensor:
        """Rows of state per matrix: for the local slots, then for the shared ones, each followed by
        the number of empty slots; three times, for three sums. int64 (3 * 2 (n + 1),)."""
        plan, count = self.plan, len(self.plan.matrices)
        local = self._matrix_of_slot[: plan.local_rows]
        first = plan.local_rows + plan.rank * plan.chunk
        shared = self._matrix_of_slot[first : first + plan.chunk]
        counts = [torch.bincount(slots, minlength=count + 1) for slots in (local, shared)]
        return torch.cat(counts).repeat(3)

    def _initial_state(self, number: int) -> State:
        return named_state.initial_state(self.plan, number, self.settings, self.device)

    def begin(self, settings: ParamGroup, states: list[State], loaded: NamedState) -> None:
        super().begin(settings, states, loaded)
        for rows, state in zip(self.plan.rows_of_flat, states, strict=True):
            shape, expected = tuple(state["exp_avg"].shape), (rows, settings["rank"])
            if shape != expected:
                raise ValueError(
                    f"the state of the group of {self.plan.matrices[0].name!r} has shape {shape}, "
                    f"expected {expected}: it was saved with another `rank`, number of ranks or "
                    "ZeRO stage: load it by name with load_named_state"
                )
        if settings["projection"] == "svd":
            self._refresh()

    def _refresh(self) -> None:
        """Recomputes the P of each flat that is due, unless a gradient is not finite."""
        plan, rank = self.plan, self.settings["rank"]
        for flat, state in enumerate(self.states):
            refresh = state["calls"] // self.settings["update_proj_gap"]
            if "projection" not in state:  # the state is from a run with another projection
                initial = self._initial_state(flat)
                state |= {key: initial[key] for key in ("projection", "made")}
            if state["made"] != refresh:
                projections = new_projections(plan, self.shard, flat, rank, self._gradient)
                if projections is not None:
                    state["projection"].copy_(projections)
                    state["made"] = refresh

    def _gradient(self, number: int) -> Tensor:
        """This rank's elements of a matrix's gradient, zeros elsewhere: (channels, inner)."""
        matrix = self.plan.matrices[number]
        gradient = torch.zeros(matrix.channels, matrix.inner, device=self.device)
        for tile in self.plan.tiles:
            if tile.matrix == number:
                channels, inner = tile.channels, tile.inner
                part = gradient[channels.start : channels.stop, inner.start : inner.stop]
                part.copy_(tile.of(self.gradients))
        return gradient

    def _projections_of(self, numbers: Sequence[int], inner: range) -> list[Tensor]:
        """The given rows of the P of some matrices."""
        plan, settings = self.plan, self.settings
        states = [self.states[plan.flat_of_matrix[number]] for number in numbers]
        if settings["projection"] == "svd":
            pairs = zip(numbers, states, strict=True)
            complete = [s["projection"].narrow(0, *plan.projection_rows[n]) for n, s in pairs]
            return [projection[inner.start : inner.stop] for projection in complete]
        matrices = [plan.matrices[number] for number in numbers]
        calls = [state["calls"] for state in states]
        return self._projections.get(matrices, inner, calls, settings, self.device)

    def _batches(self) -> Iterator[tuple[range, list[int]]]:
        """Matrices whose P are made together, and the rows of P that they need."""
        for inner, numbers in self._matrices_with.items():
            size = 4 * len(inner) * self.settings["rank"]
            count = max(1, limits(self.device).batch_bytes // size)
            for first in range(0, len(numbers), count):
                yield inner, numbers[first : first + count]

    def step_metrics(self) -> dict[str, Tensor]:
        return self._step_metrics

    def named_state(self, states: Sequence[State]) -> Iterator[tuple[str, Tensor]]:
        for number, matrix in enumerate(self.plan.matrices):
            for key, value in named_state.of_matrix(self.plan, number, states).items():
                is_partial = key in named_state.PARTIAL
                yield f"{matrix.name}/{key}", self._summed(value) if is_partial else value

    def _fill(self, number: int, state: State, loaded: NamedState) -> None:
        names = {n: self.plan.matrices[n].name for n in self.plan.matrices_of_flat[number]}
        own = {f"{name}/{key}" for name in names.values() for key in named_state.KEYS}
        drop_others(self.shards[number], loaded, own, "APOLLO's of these matrices")
        for matrix, name in names.items():
            found = [key for key in named_state.KEYS if f"{name}/{key}" in loaded]
            if found:
                entries = {key: loaded.pop(f"{name}/{key}") for key in found}
                named_state.fill_matrix(self.plan, matrix, state, entries)

    def square_sum(self) -> Tensor:
        return self._squares.sum(dtype=torch.float64)

    def project(self) -> Tensor:
        plan, settings = self.plan, self.settings
        rank = settings["rank"]
        is_written = self._is_written and settings["scale_type"] == "channel"
        new = torch.empty if is_written else torch.zeros
        self._sketch = new(plan.slots, rank, device=self.device)
        self._squares = new(plan.slots, device=self.device)
        for inner, numbers in self._batches():
            projections = self._projections_of(numbers, inner)
            for number, projection in zip(numbers, projections, strict=True):
                for tile in self._tiles_of[number]:
                    first = tile.inner.start - inner.start
                    is_all = len(tile.inner) == len(inner)
                    rows = projection if is_all else projection[first : first + len(tile.inner)]
                    self._project_tile(tile, rows)
        if settings["scale_type"] == "channel":  # rows have their norms so far
            squares = self._squares.square()
            self._squares = torch.where(self._has_rows, squares, self._squares)
        shared = [self._sketch[plan.local_rows :], self._squares[plan.local_rows :, None]]
        return torch.cat(shared, dim=1).view(plan.world, plan.chunk * (rank + 1))

    def _project_tile(self, tile: Tile, projection: Tensor) -> None:
        """Adds a tile's contribution to R and to the squared norms. `projection`: its rows of P."""
        channels, slots = tile.of(self.gradients), tile.slots
        sketch, squares = self._sketch[slots], self._squares[slots]
        by_rows = self.plan.matrices[tile.matrix].by_rows
        if by_rows:  # this tile has all elements of the row that this rank has
            torch.mm(channels, projection, out=sketch)
        else:
            sketch.addmm_(channels, projection)
        if self.settings["scale_type"] == "tensor":  # only their sum is needed
            squares[0] += torch.linalg.vector_norm(channels).square()
        elif by_rows:
            torch.linalg.vector_norm(channels, dim=1, out=squares)
        else:  # torch's norm is slow along columns
            squares += channels.square().sum(1)

    def adapt(self, received: Tensor, all_finite: Tensor) -> Tensor:
        plan, settings, rank = self.plan, self.settings, self.settings["rank"]
        shared = received.view(plan.chunk, rank + 1)
        self._sketch[plan.local_rows : plan.rows] = shared[:, :rank]
        self._squares[plan.local_rows : plan.rows] = shared[:, rank]
        sketch = self._sketch[: plan.rows]
        squares = self._squares[: plan.rows].double()
        norms = torch.linalg.vector_norm(sketch, dim=1).double()
        adapted_norms = torch.linalg.vector_norm(self._adam(sketch, all_finite), dim=1).double()
        self._ratios = torch.ones_like(norms)
        if settings["scale_type"] == "channel":
            self._ratios = adapted_norms / (norms + 1e-8)
        # In one dimension, where a GPU has many threads for a segment. Unsafe: its checks of the
        # lengths would wait for the device.
        of_channel = torch.cat([self._ratios**2 * squares, norms**2, adapted_norms**2])
        sums = torch.segment_reduce(
            of_channel, "sum", lengths=self._channels_of, axis=0, unsafe=True, initial=0
        )
        sums = sums.view(3, 2, -1).sum(1)[:, :-1].T
        return torch.cat([self._ratios[plan.local_rows :], sums.flatten()])

    def apply(self, gathered: Tensor, all_finite: Tensor) -> None:
        plan, settings = self.plan, self.settings
        gathered = gathered.to(self.device)
        shared_ratios = gathered[:, : plan.chunk].flatten()
        ratios = torch.cat([self._ratios[: plan.local_rows], shared_ratios])
        sums = gathered[:, plan.chunk :].sum(0).view(-1, 3)
        squares, norms, adapted = sums.unbind(1)  # (n,) each
        of_matrix = adapted.sqrt() / (norms.sqrt() + 1e-8)
        scale = of_matrix if settings["scale_type"] == "tensor" else torch.ones_like(squares)
        alpha = math.sqrt(settings["scale"])
        limit = self._limit(
            scale * squares.sqrt() * (alpha if settings["scale_front"] else 1), all_finite
        )
        self._step_metrics = {"scale": of_matrix, "limited": limit > 1, "seen": norms > 0}
        decay = torch.where(all_finite, settings["lr"] * settings["weight_decay"], 0.0)
        rate = settings["lr"] * alpha * self._corrections() * scale / limit * (1 - decay)
        rate = torch.cat([rate, rate.new_zeros(1)])[self._matrix_of_slot]
        step = torch.where(all_finite, ratios * rate, 0.0).float()[:, None]
        decays = decay if settings["weight_decay"] else None
        if self._fused_update:
            self._fused_update(self.weights, self.gradients, step.flatten(), decays, all_finite)
        else:
            self._update(step, decays, all_finite)
        self.end()

    def _update(self, step: Tensor, decay: Tensor | None, all_finite: Tensor) -> None:
        masked = _mask(all_finite)
        for tile in self.plan.tiles:
            weight, gradient = tile.of(self.weights), masked(tile.of(self.gradients))
            if decay is not None:  # not w *= 1 - decay, which always rounds one way
                weight.addcmul_(weight, decay, value=-1)
            weight.addcmul_(gradient, step[tile.slots], value=-1)

    def end(self) -> None:
        super().end()
        self._sketch = self._squares = self._ratios = torch.empty(0)

    def _adam(self, sketch: Tensor, all_finite: Tensor) -> Tensor:
        """Updates M and V and returns N = M / (sqrt(V) + eps); if not all gradients are finite, it
        updates nothing and returns 0: (c, r).

        Uses torch's fused Adam on weights of 0, with a step count so large that its bias correction
        vanishes.
        """
        adapted = torch.zeros_like(sketch)
        rows = self.plan.rows_of_flat
        beta1, beta2 = self.settings["betas"]
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
            eps=self.settings["eps"],
            maximize=False,
        )
        steps = [state["step"] for state in self.states]
        foreach._foreach_add_(steps, [all_finite.float()] * len(steps))
        for state in self.states:
            state["calls"] += 1
        return adapted

    def _corrections(self) -> Tensor:
        """sqrt(1 - b2^t) / (1 - b1^t) of each matrix, where t excludes skipped steps: (n,)."""
        steps = torch.stack([state["step"] for state in self.states]).double()
        beta1, beta2 = self.settings["betas"]
        return ((1 - beta2**steps).sqrt() / (1 - beta1**steps))[self._flat_of_matrix]

    def _limit(self, norms: Tensor, all_finite: Tensor) -> Tensor:
        """L of each matrix, from the norms of U: (n,). The limiter starts at the first norm above
        0, because a previous norm of 0 would limit every later step to 0."""
        gamma = self.settings["gamma"]
        if gamma is None or gamma == math.inf:
            return torch.ones_like(norms)
        limiters = [state["limiter"] for state in self.states]
        last = torch.cat(limiters)
        growth = (norms / (last + 1e-8)).clamp(min=gamma) / gamma
        limit = torch.where(last > 0, growth, 1.0)
        last = torch.where(all_finite & (norms > 0), norms / limit, last).float()
        foreach._foreach_copy_(limiters, list(last.split([len(limiter) for limiter in limiters])))
        return limit


def _mask(condition: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that returns a fp32 tensor if the condition holds, else zeros. (0 times inf or NaN
    is not 0.) It masks the bits, unless reading the condition does not wait for a device."""
    if not limits(condition.device).is_asynchronous:
        return (lambda tensor: tensor) if condition else torch.zeros_like
    bits = -condition.to(torch.int32)
    return lambda tensor: (tensor.view(torch.int32) & bits).view(torch.float32)
