"""Muon: the momentum of each matrix, orthogonalized, exact under every ZeRO stage.

Jordan, Jin, Boza, You, Cesista, Newhouse and Bernstein, "Muon: An optimizer for hidden layers in
neural networks", 2024. The scale "match_rms_adamw" is that of Liu et al., "Muon is Scalable for LLM
Training", arXiv 2502.16982. For a gradient G of a matrix of m rows and n columns:

    M <- mu M + (1 - mu) G,   B = mu M + (1 - mu) G  (nesterov)  or  B = M
    X <- B / |B|,   then `ns_steps` times   X <- a X + (b X X' + c (X X')^2) X
    W <- (1 - lr weight_decay) W - lr s X

    s = sqrt(max(1, m / n))  ("original")  or  0.2 sqrt(max(m, n))  ("match_rms_adamw")

as in torch.optim.Muon. Momentum, decay and update are elementwise, on the shards; only B goes to
the owner of a matrix (plan.py), and only X comes back, in the dtype of the iteration.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from harness.optim.apollo.channels import Matrix
from harness.optim.matrices.groups import Batch, MatrixGroup, may_branch
from harness.optim.matrices.optimizer import MatrixOptimizer
from harness.optim.sharded.elementwise import Elementwise
from harness.optim.sharded.settings import Rules, is_bool, is_positive_int
from harness.optim.sharded.tensor_groups import ParamGroup, State, foreach

COEFFICIENTS = 3.4445, -4.7750, 2.0315
"""Of Newton-Schulz: Jordan et al.'s, which keep singular values between about 0.7 and 1.2."""

EPS = 1e-7
"""The smallest norm that a matrix is divided by."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class MuonGroup(MatrixGroup, Elementwise):
    """Matrices that Muon steps."""

    KEYS = ("momentum_buffer",)
    METHOD = "Muon"

    def make_plans(self, states: Sequence[State]) -> None:
        super().make_plans(states)
        rule = self.settings["adjust_lr"]
        self._scales = [scale_of(matrix, rule) for matrix in self.held_matrices()]

    def outgoing(self) -> list[Tensor]:
        gradients = self.split(self.gradients)
        if not gradients:
            return []
        momentum = self.settings["momentum"]
        sent = foreach._foreach_lerp(self._momenta(), gradients, 1 - momentum)
        if self.settings["nesterov"]:
            foreach._foreach_lerp_(sent, gradients, 1 - momentum)
        return sent

    def cost(self, matrix: Matrix) -> float:
        return cost_of(matrix)

    def solve_batch(self, batch: Batch, complete: Tensor, all_finite: Tensor) -> Tensor:
        return newton_schulz(complete, self.settings["ns_steps"])

    def apply(self, updates: Sequence[Tensor], all_finite: Tensor) -> None:
        lr, weight_decay = self.settings["lr"], self.settings["weight_decay"]
        self.count_step(all_finite)
        if updates:
            gradients = self.split(self._finite_gradients(all_finite))
            foreach._foreach_lerp_(self._momenta(), gradients, 1 - self.settings["momentum"])
            weights = self.split(self.weights)
            if weight_decay:
                foreach._foreach_mul_(weights, torch.where(all_finite, 1 - lr * weight_decay, 1.0))
            by_scale: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
            for scale, *pair in zip(self._scales, weights, updates, strict=True):
                for found, tensor in zip(by_scale.setdefault(scale, ([], [])), pair, strict=True):
                    found.append(tensor.to(self.device))
            for scale, (own, steps) in by_scale.items():
                foreach._foreach_add_(own, steps, alpha=-lr * scale)
        self.end()

    def _momenta(self) -> list[Tensor]:
        return self.split([state["momentum_buffer"] for state in self.states])

    def _finite_gradients(self, all_finite: Tensor) -> list[Tensor]:
        """The gradients or, in a step that is skipped, the momenta: those that M keeps."""
        if may_branch(all_finite):
            return self.gradients
        pairs = zip(self.gradients, self.states, strict=True)
        return [torch.where(all_finite, g, state["momentum_buffer"]) for g, state in pairs]


class Muon(MatrixOptimizer):
    """Muon for matrices, AdamW for the rest; stand-alone, or as DeepSpeed's client optimizer.

    `matrix_param_groups` builds the groups of a model; a parameter group with `dense = True` is
    AdamW. State per stepped tensor, of its size: `momentum_buffer`, fp32, or AdamW's.
    """

    TITLE = "a Muon optimizer of harness"
    MARK = "adjust_lr"
    REMEDY = (
        "if it is of DeepSpeed's Muon, use optimizer.name = 'muon-deepspeed'; to load the moments "
        "of an AdamW, use load_named_state"
    )
    IS_ELEMENTWISE = True
    GROUP = MuonGroup

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        ns_steps: int = 5,
        adjust_lr: Literal["original", "match_rms_adamw"] = "original",
        ns_dtype: Literal["auto", "fp32", "bf16"] = "auto",
        adam_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ):
        """`adjust_lr`: "original" makes the update's spectral norm about lr; "match_rms_adamw" its
        root mean square about that of AdamW's, such that both may have the same `lr` and
        `weight_decay`.

        `ns_steps`, `ns_dtype`: of the Newton-Schulz iteration; "auto" is bf16 on GPUs and fp32 on
        CPUs. `adam_lr`, `betas`, `eps`: of AdamW; without an `adam_lr` it uses `lr`. Raises
        ValueError for invalid settings, and for a parameter that is not a matrix in a group that is
        not dense.
        """
        if ns_dtype not in ("auto", *DTYPES):
            raise ValueError(f"ns_dtype = {ns_dtype!r} is not valid")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "ns_steps": ns_steps,
            "adjust_lr": adjust_lr,
            "betas": betas,
            "eps": eps,
        }
        super().__init__(params, defaults, DTYPES.get(ns_dtype), adam_lr)

    def _rules(self, group: ParamGroup) -> Rules:
        return dict(super()._rules(group)) | {
            "momentum": lambda momentum: 0 <= momentum < 1,
            "nesterov": is_bool,
            "ns_steps": lambda steps: is_positive_int(steps) and steps < 100,
            "adjust_lr": lambda rule: rule in ("original", "match_rms_adamw"),
        }

    def dtype_on(self, device: torch.device) -> torch.dtype:
        return self._dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)


def newton_schulz(matrices: Tensor, steps: int) -> Tensor:
    """Matrices with the same singular vectors and singular values near 1: (n, rows, columns).
    Overwrites the matrices."""
    norms = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True)
    matrices.div_(norms.clamp(min=EPS))
    if matrices.device.type != "cpu":
        return _iterated(matrices, steps, torch.baddbmm)
    for matrix in matrices:  # one keeps all cores busy, and its products are faster
        start = matrix if steps > 1 else matrix.clone()  # no product overwrites its factors
        _iterated(start, steps, torch.addmm, out=matrix)
    return matrices


def _iterated(
    x: Tensor, steps: int, add_product: Callable[..., Tensor], out: Tensor | None = None
) -> Tensor:
    """Newton-Schulz from the shorter side; the last product is written to `out`."""
    a, b, c = COEFFICIENTS
    is_tall = x.shape[-2] > x.shape[-1]
    for step in range(steps):
        gram = x.mT @ x if is_tall else x @ x.mT
        polynomial = add_product(gram, gram, gram, beta=b, alpha=c)
        factors = (x, polynomial) if is_tall else (polynomial, x)
        x = add_product(x, *factors, beta=a, out=out if step == steps - 1 else None)
    return x


def cost_of(matrix: Matrix) -> float:
    """The work of an iteration for a matrix: multiplications."""
    short, long = sorted((matrix.rows, matrix.columns))
    return float(short) ** 2 * (2 * long + short)


def scale_of(matrix: Matrix, rule: str) -> float:
    """The factor of the learning rate of a matrix."""
    if rule == "match_rms_adamw":
        return 0.2 * math.sqrt(max(matrix.rows, matrix.columns))
    return math.sqrt(max(1.0, matrix.rows / matrix.columns))
