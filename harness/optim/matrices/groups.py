"""Matrices of one parameter group that are computed together, in batches of equal shapes."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from harness.optim.apollo.channels import Matrix
from harness.optim.matrices.plan import OwnerPlan
from harness.optim.sharded.tensor_groups import NamedState, ParamGroup, State, TensorGroup
from harness.zero.shards import Shard

BATCH_ELEMENTS = 2**26
"""Elements of a batch at most, unless it is one matrix: a batch needs several times as much."""


@dataclass
class Batch:
    """Matrices of one shape that this rank computes together."""

    shape: tuple[int, int]
    plan: int
    """The number of the plan of its first matrix."""
    matrices: list[int] = field(default_factory=list)
    """Their numbers in their plans."""
    pieces: list[int] = field(default_factory=list)
    """Their pieces, which fill them in this order, among those of all matrices of the group."""
    lengths: list[int] = field(default_factory=list)
    """The elements of each piece."""


class MatrixGroup(TensorGroup):
    """Matrices of a parameter group: pieces of them go to their owners, and their updates back."""

    batch_across_flats = True
    """Whether a batch may have matrices of several flats, whose state is then not in one tensor."""

    def __init__(
        self,
        flats: Sequence[Tensor],
        shards: Sequence[Shard],
        matrices: Mapping[str, Sequence[Matrix]],
        load: list[float],
        dtype: torch.dtype,
    ):
        """`matrices`: the matrices of each parameter, by parameter name. `load`: the work of each
        rank. `dtype`: of the computation."""
        super().__init__(flats, shards)
        self._matrices, self._load, self.dtype = matrices, load, dtype
        self.compute_device = self.device
        if self.shard.group is not None and self.shard.device is not None:
            self.compute_device = self.shard.device
        self.plans: list[OwnerPlan] = []
        self._batches: list[Batch] = []

    @property
    def owned_pieces(self) -> int:
        """The number of pieces of this rank's own matrices."""
        return sum(len(plan.owned) for plan in self.plans)

    @property
    def held_pieces(self) -> int:
        """The number of pieces that this rank holds."""
        return sum(len(plan.held) for plan in self.plans)

    def begin(self, settings: ParamGroup, states: list[State], loaded: NamedState) -> None:
        self.settings = settings
        if not self.plans:
            self.make_plans(states)
        super().begin(settings, states, loaded)

    def make_plans(self, states: Sequence[State]) -> None:
        """Decides the owners, unless the states name them."""
        for shard, state in zip(self.shards, states, strict=True):
            owners = state.get("owners")
            self.plans.append(OwnerPlan(shard, self._matrices, self.cost, self._load, owners))
        self._batches = self._make_batches()

    def outgoing(self) -> list[Tensor]:
        """What owners need of each piece that this rank holds: fp32, 1-D."""
        raise NotImplementedError

    def solve(self, arrived: Sequence[Tensor], all_finite: Tensor) -> list[Tensor]:
        """The updates of this rank's own matrices, by piece, and 0 if not all gradients are finite.
        `arrived`: what has arrived of each of these pieces."""
        solved: list[Tensor] = [torch.empty(0)] * len(arrived)
        for batch in self._batches:
            rows, columns = batch.shape
            complete = torch.empty(
                len(batch.matrices), rows, columns, dtype=self.dtype, device=self.compute_device
            )
            parts = complete.view(-1).split(batch.lengths)
            for part, piece in zip(parts, batch.pieces, strict=True):
                part.copy_(arrived[piece])
            update = zeros_unless(all_finite, self.solve_batch(batch, complete, all_finite))
            parts = update.reshape(-1).split(batch.lengths)
            for part, piece in zip(parts, batch.pieces, strict=True):
                solved[piece] = part
        return solved

    @abstractmethod
    def cost(self, matrix: Matrix) -> float:
        """The work that a matrix is in a step."""

    @abstractmethod
    def solve_batch(self, batch: Batch, complete: Tensor, all_finite: Tensor) -> Tensor:
        """The updates of a batch of matrices: (n, rows, columns). `complete`: what has been sent,
        which may be overwritten."""

    @abstractmethod
    def apply(self, updates: Sequence[Tensor], all_finite: Tensor) -> None:
        """Updates the weights, unless the step is skipped. `updates`: of each piece that this rank
        holds."""

    def split(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Views of the pieces that this rank holds, of tensors of the flats' sizes."""
        pairs = zip(self.plans, tensors, strict=True)
        return [part for plan, tensor in pairs for part in plan.split(tensor)]

    def held_matrices(self) -> list[Matrix]:
        """The matrix of each piece that this rank holds."""
        return [plan.matrices[piece.matrix] for plan in self.plans for piece in plan.held]

    def _make_batches(self) -> list[Batch]:
        open_batches: dict[tuple[int, ...], Batch] = {}
        batches: list[Batch] = []
        firsts = [0, *accumulate(len(plan.owned) for plan in self.plans)]
        for number, plan in enumerate(self.plans):
            for index, piece in enumerate(plan.owned):
                matrix = plan.matrices[piece.matrix]
                shape = matrix.rows, matrix.columns
                key = shape if self.batch_across_flats else (number, *shape)
                batch = open_batches.get(key)
                if piece.start == 0:
                    most = max(1, BATCH_ELEMENTS // (matrix.rows * matrix.columns))
                    if batch is None or len(batch.matrices) == most:
                        batch = open_batches[key] = Batch(shape, number)
                        batches.append(batch)
                    batch.matrices.append(piece.matrix)
                assert batch is not None  # a matrix's first piece comes first
                batch.pieces.append(firsts[number] + index)
                batch.lengths.append(piece.length)
        return sorted(batches, key=lambda batch: (batch.plan, batch.shape))


def may_branch(condition: Tensor) -> bool:
    """Whether the host may look at a condition: on CPUs, where that waits for no device."""
    return condition.device.type == "cpu"


def zeros_unless(condition: Tensor, tensor: Tensor) -> Tensor:
    """A tensor if the condition holds, else zeros. (0 times inf or NaN is not 0.)"""
    if may_branch(condition):
        return tensor if condition else torch.zeros_like(tensor)
    return torch.where(condition, tensor, 0)
