"""SOAP: AdamW in the eigenbasis of Shampoo's preconditioners, exact under every ZeRO stage.

Vyas, Morwani, Zhao, Kwun, Shapira, Brandfonbrener, Janson and Kakade, "SOAP: Improving and
Stabilizing Shampoo using Adam", arXiv 2409.11321; the arithmetic is that of the authors' code. For
a gradient G of a matrix, with bases Q and P that are not changed but every `precondition_frequency`
steps:

    R = Q' G P
    M <- b1 M + (1 - b1) R,   V <- b2 V + (1 - b2) R^2
    W <- (W - lr sqrt(1 - b2^t) / (1 - b1^t) Q (M / (sqrt(V) + eps)) P') (1 - lr weight_decay)
    L <- bs L + (1 - bs) G G',   K <- bs K + (1 - bs) G' G                   (bs: shampoo_beta)
    Q, P <- one step of power iteration and a QR decomposition, from L Q and K P; M is rotated along

The first step only computes L, K and their eigenvectors. The owner of a matrix (plan.py) receives
its gradient, keeps all of its state, and returns the update; the decay is elementwise, on the
shards. Of a side longer than `max_precond_dim` there is no basis: it is not rotated.

Everything is fp32. On CPUs every matrix is computed by itself, in memory of its own: results do not
depend on the layout, not even where L has fewer than all ranks, and rounding chooses the basis.
Nothing waits for the device but the first step.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from harness.optim.apollo.channels import Matrix
from harness.optim.matrices import soap_state
from harness.optim.matrices.groups import Batch, MatrixGroup, zeros_unless
from harness.optim.matrices.optimizer import MatrixOptimizer
from harness.optim.matrices.plan import OwnerPlan
from harness.optim.sharded.settings import Rules, is_positive_int
from harness.optim.sharded.tensor_groups import NamedState, ParamGroup, State, drop_others, foreach
from harness.zero.shards import Shard

Tensors = dict[str, Tensor]
"""The state of a batch of matrices, by key: (n, ...) each."""


class SoapGroup(MatrixGroup):
    """Matrices that SOAP steps."""

    batch_across_flats = False

    def begin(self, settings: ParamGroup, states: list[State], loaded: NamedState) -> None:
        super().begin(settings, states, loaded)
        for state in states:
            state["calls"] += 1

    def named_state(self, states: Sequence[State]) -> Iterator[tuple[str, Tensor]]:
        if not self.plans:
            self.make_plans(states)
        for plan, state in zip(self.plans, states, strict=True):
            for number, matrix in enumerate(plan.matrices):
                entries = soap_state.of_matrix(plan, number, state, self._longest)
                for key, value in entries.items():
                    is_partial = key not in soap_state.COUNTERS
                    yield f"{matrix.name}/{key}", self._summed(value) if is_partial else value

    def cost(self, matrix: Matrix) -> float:
        return cost_of(matrix, self.settings)

    def outgoing(self) -> list[Tensor]:
        return self.split(self.gradients)

    def solve_batch(self, batch: Batch, complete: Tensor, all_finite: Tensor) -> Tensor:
        state, plan = self.states[batch.plan], self.plans[batch.plan]
        gradient = zeros_unless(all_finite, complete)
        views = soap_state.views(plan, state, self._longest)
        of_matrix = [views[number] for number in batch.matrices]
        if gradient.device.type == "cpu" or self.device != self.compute_device:
            updates = []
            for single, tensors in zip(gradient, of_matrix, strict=True):
                own = {
                    key: tensor[None].to(self.compute_device, copy=True)
                    for key, tensor in tensors.items()
                }
                updates.append(self._solve(single[None].clone(), own, state, all_finite))
                for key, tensor in tensors.items():
                    tensor.copy_(own[key][0])
            return torch.cat(updates)
        first = of_matrix[0]
        stored = {
            key: tensor.as_strided(
                (len(of_matrix), *tensor.shape), (tensor.numel(), *tensor.stride())
            )
            for key, tensor in first.items()
        }
        return self._solve(gradient, stored, state, all_finite)

    def apply(self, updates: Sequence[Tensor], all_finite: Tensor) -> None:
        lr, weight_decay = self.settings["lr"], self.settings["weight_decay"]
        for plan, state, weight in zip(self.plans, self.states, self.weights, strict=True):
            own, updates = updates[: len(plan.held)], updates[len(plan.held) :]
            if not state["started"]:
                state["started"] = int(all_finite)  # the only time that the host waits
                continue
            state["step"] += all_finite
            weights = plan.split(weight)
            if not weights:
                continue
            own = [update.to(self.device) for update in own]
            foreach._foreach_add_(weights, own, alpha=-lr)
            if weight_decay:
                foreach._foreach_mul_(weights, torch.where(all_finite, 1 - lr * weight_decay, 1.0))
        self.end()

    @property
    def _longest(self) -> int:
        return self.settings["max_precond_dim"]

    def _initial_state(self, number: int) -> State:
        return soap_state.initial_state(self.plans[number], self.settings, self.device)

    def _fill(self, number: int, state: State, loaded: NamedState) -> None:
        plan = self.plans[number]
        own = {f"{matrix.name}/{key}" for matrix in plan.matrices for key in soap_state.KEYS}
        drop_others(self.shards[number], loaded, own, "SOAP's of these matrices")
        for index, matrix in enumerate(plan.matrices):
            found = [key for key in soap_state.KEYS if f"{matrix.name}/{key}" in loaded]
            if found:
                entries = {key: loaded.pop(f"{matrix.name}/{key}") for key in found}
                soap_state.fill_matrix(plan, index, state, entries, self._longest)

    def _solve(
        self, gradient: Tensor, tensors: Tensors, state: State, all_finite: Tensor
    ) -> Tensor:
        """The update of a batch of matrices, (n, rows, columns). Updates their state in place."""
        beta1, beta2 = self.settings["betas"]
        shampoo_beta = self.settings["shampoo_beta"]
        shampoo_beta = beta2 if shampoo_beta is None else shampoo_beta
        update = torch.zeros_like(gradient)
        if state["started"]:
            rotated = _rotated(gradient, tensors)
            tensors["exp_avg"].lerp_(rotated, torch.where(all_finite, 1 - beta1, 0.0))
            square = rotated.square_()
            tensors["exp_avg_sq"].lerp_(square, torch.where(all_finite, 1 - beta2, 0.0))
            step = (state["step"].to(gradient.device) + 1).double()
            correction = ((1 - beta2**step).sqrt() / (1 - beta1**step)).float()
            adam = tensors["exp_avg"] / tensors["exp_avg_sq"].sqrt().add_(self.settings["eps"])
            update = _rotated_back(adam, tensors).mul_(correction)
        weight = torch.where(all_finite, 1 - shampoo_beta, 0.0)
        if "left" in tensors:
            tensors["left"].lerp_(gradient @ gradient.mT, weight)
        if "right" in tensors:
            tensors["right"].lerp_(gradient.mT @ gradient, weight)
        if not state["started"]:
            for side in ("left", "right"):
                if side in tensors:
                    tensors[f"{side}_basis"].copy_(eigenvectors(tensors[side]))
        elif (state["calls"] - 1) % self.settings["precondition_frequency"] == 0:
            _refresh(tensors, all_finite)
        return update


class Soap(MatrixOptimizer):
    """SOAP for matrices, AdamW for the rest; stand-alone, or as DeepSpeed's client optimizer.

    `matrix_param_groups` builds the groups of a model; a parameter group with `dense = True` is
    AdamW. The state of matrices is on their owners: soap_state.py.
    """

    TITLE = "a SOAP optimizer of harness"
    MARK = "precondition_frequency"
    GROUP = SoapGroup
    STATE_SETTINGS = ("max_precond_dim", "heads", "stacked")
    COUNTERS = soap_state.COUNTERS

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-3,
        *,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        adam_lr: float | None = None,
    ):
        """`betas`: of Adam, also of dense parameters. `shampoo_beta`: of the preconditioners; None:
        the second of `betas`.

        `precondition_frequency`: steps between new bases. `max_precond_dim`: the longest side that
        has a basis. `adam_lr`: learning rate of dense parameters, if it is not `lr`. Raises
        ValueError for invalid settings, and for a parameter that is not a matrix in a group that is
        not dense.
        """
        defaults = {
            "lr": lr,
            "betas": betas,
            "shampoo_beta": shampoo_beta,
            "eps": eps,
            "weight_decay": weight_decay,
            "precondition_frequency": precondition_frequency,
            "max_precond_dim": max_precond_dim,
        }
        super().__init__(params, defaults, torch.float32, adam_lr)

    @classmethod
    def resharded(
        cls,
        old: Iterable[tuple[Sequence[Shard], Sequence[State]]],
        read: Callable[[State], State],
        new: Shard,
        matrices: Mapping[str, Sequence[Matrix]],
        settings: ParamGroup,
        load: list[float],
    ) -> State:
        """As the base class."""
        plan = OwnerPlan(new, matrices, partial(cost_of, settings=settings), load)
        state = soap_state.initial_state(plan, settings) | {"step": torch.zeros(())}
        for shards, states in old:
            for shard, own in zip(shards, states, strict=True):
                before = OwnerPlan(shard, matrices, lambda _: 0, [], own["owners"])
                soap_state.reshard(before, own, read, plan, state, settings["max_precond_dim"])
        return state

    def _rules(self, group: ParamGroup) -> Rules:
        return dict(super()._rules(group)) | {
            "shampoo_beta": lambda beta: beta is None or 0 <= beta < 1,
            "precondition_frequency": is_positive_int,
            "max_precond_dim": lambda longest: type(longest) is int and longest >= 0,
        }

    def dtype_on(self, device: torch.device) -> torch.dtype:
        return torch.float32


def cost_of(matrix: Matrix, settings: ParamGroup) -> float:
    """The work that a matrix is in a step: two products with each basis, one for each
    preconditioner, and at every refresh four more and a QR decomposition."""
    longest, refresh = settings["max_precond_dim"], 6 / settings["precondition_frequency"]
    sides = [side for side in (matrix.rows, matrix.columns) if side <= longest]
    size = matrix.rows * matrix.columns
    return size + sum(3 * size * side + refresh * side**3 for side in sides)


def eigenvectors(symmetric: Tensor) -> Tensor:
    """The eigenvectors of positive matrices as columns, from the largest eigenvalue to the
    smallest, each with a positive largest entry: (n, side, side)."""
    vectors = torch.linalg.eigh(symmetric.double()).eigenvectors.flip(-1)
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return (vectors * largest.sign()).float()


def _rotated(matrix: Tensor, tensors: Tensors) -> Tensor:
    """Q' X P."""
    if "left_basis" in tensors:
        matrix = tensors["left_basis"].mT @ matrix
    return matrix @ tensors["right_basis"] if "right_basis" in tensors else matrix.clone()


def _rotated_back(matrix: Tensor, tensors: Tensors) -> Tensor:
    """Q X P'."""
    if "left_basis" in tensors:
        matrix = tensors["left_basis"] @ matrix
    return matrix @ tensors["right_basis"].mT if "right_basis" in tensors else matrix.clone()


def _refresh(tensors: Tensors, all_finite: Tensor) -> None:
    """New bases, unless the step is skipped: V is reordered, M rotated."""
    mean = _rotated_back(tensors["exp_avg"], tensors)
    square = tensors["exp_avg_sq"]
    for side, dim in (("left", -2), ("right", -1)):
        if side not in tensors:
            continue
        preconditioner, basis = tensors[side], tensors[f"{side}_basis"]
        values = (basis * (preconditioner @ basis)).sum(-2)  # diag(Q' L Q): (n, side)
        order = values.sort(dim=-1, descending=True, stable=True).indices
        index = order[:, :, None] if dim == -2 else order[:, None, :]
        square = square.gather(dim, index.expand_as(square))
        ordered = basis.gather(-1, order[:, None, :].expand_as(basis))
        vectors, upper = torch.linalg.qr(preconditioner @ ordered)
        signs = upper.diagonal(dim1=-2, dim2=-1).sign()
        vectors = vectors * torch.where(signs == 0, 1.0, signs)[:, None, :]
        basis.copy_(torch.where(all_finite, vectors, basis))
    tensors["exp_avg"].copy_(torch.where(all_finite, _rotated(mean, tensors), tensors["exp_avg"]))
    tensors["exp_avg_sq"].copy_(torch.where(all_finite, square, tensors["exp_avg_sq"]))
