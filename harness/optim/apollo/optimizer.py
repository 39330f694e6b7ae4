"""APOLLO: AdamW's step sizes from a low-rank sketch of the gradient, exact under every ZeRO stage.

Zhu, Zhang, Cong, Liu, Park, Chandra, Long, Pan, Wang and Lee, "APOLLO: SGD-like Memory, AdamW-level
Performance", MLSys 2025, arXiv 2412.05270. The norm-growth limiter is that of Chen, Feng, Li, Lai,
Yue, Yuan and Wang, "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?",
arXiv 2410.01623.

For a gradient G whose channels (rows or columns, along the longer side) are g_c, at step t:

    R_c = g_c P                          P: inner x r, entries from N(0, 1/r), new every `gap` steps
    M <- b1 M + (1 - b1) R,   V <- b2 V + (1 - b2) R^2,   N = M / (sqrt(V) + eps)
    s_c = |N_c| / |R_c|                  (Mini: r = 1, and one s = |N| / |R| for the matrix)
    U_c = s_c g_c
    U <- U / L,   L = max(|U| / n, gamma) / gamma,   n <- |U|        (limiter; n: the previous |U|)
    W <- (W - lr sqrt(scale) sqrt(1 - b2^t) / (1 - b1^t) U) (1 - lr weight_decay)

A rank keeps M and V of its own channels only (channels.py) and generates P where it needs it
(philox.py). For channels that a shard boundary cuts, one reduce-scatter sums (R_c, |g_c|^2) and one
all-gather returns s_c. |U|^2 = sum s_c^2 |g_c|^2, so the limiter needs no further collective.
Arithmetic and state are fp32, sums over channels fp64; nothing waits for the device.

If a gradient (or its square) is not finite on any rank, all ranks skip the step: neither weights
nor state change, except for `calls`, which decides when P is refreshed.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from harness.devices import is_gpu_used
from harness.optim.apollo import named_state
from harness.optim.apollo.channels import ChannelPlan, Matrix, matrices_of
from harness.optim.apollo.exchange import Exchange
from harness.optim.apollo.lowrank import LowRank
from harness.optim.apollo.param_groups import apollo_param_groups
from harness.optim.apollo.philox import gaussian
from harness.optim.apollo.projections import PROJECTIONS, Projections
from harness.optim.sharded.elementwise import Dense
from harness.optim.sharded.optimizer import ShardedOptimizer
from harness.optim.sharded.param_groups import split_by_kind
from harness.optim.sharded.settings import Rules, are_betas, is_bool, is_positive_int
from harness.optim.sharded.tensor_groups import ParamGroup, State, TensorGroup, all_finite
from harness.zero.shards import Shard


class Apollo(ShardedOptimizer):
    """APOLLO for matrices, AdamW for the rest; stand-alone, or as DeepSpeed's client optimizer.

    A parameter group with `rank = 0` is dense AdamW; `apollo_param_groups` builds the groups of a
    model. A group with `stacked = True` has stacks of matrices, one matrix per expert. State per
    stepped tensor: `exp_avg` and `exp_avg_sq` of shape (channels on this rank, rank), `limiter`
    (matrices,), `step` (), and the int `calls`.
    """

    TITLE = "an APOLLO optimizer"
    MARK = "rank"
    STATE_SETTINGS = ("rank",)
    COUNTERS = ("step", "calls")
    RENEWED: ClassVar = {"made": -1}
    SELECTION = ("low_rank", "dense", "stacked")
    COPIED = (*ShardedOptimizer.COPIED, "_fused", "_projections")
    RANK: ClassVar = 256
    """The default rank."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        rank: int = RANK,
        scale: float = 1.0,
        scale_type: Literal["channel", "tensor"] = "channel",
        scale_front: bool = False,
        update_proj_gap: int = 200,
        gamma: float | None = 1.01,
        projection: Literal["gaussian", "rademacher", "svd"] = "gaussian",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        seed: int = 0,
        fused: bool = False,
    ):
        """`scale`: alpha; its square root multiplies the update (with `scale_front`, before the
        limiter).

        `gamma`: the largest factor by which the update's norm may grow per step; None or inf: no
        limiter. `eps` is added before the bias correction for matrices, after it for dense AdamW.
        `projection`: "svd" computes P from the gradient at each refresh (spectral.py), and each
        rank stores it for the matrices that it has elements of, as `projection` (any, rank).
        `fused`: Triton kernels (kernels.py), on a GPU. Raises ValueError for invalid settings, and
        for a group of rank > 0 with a parameter that is not a matrix.
        """
        self._fused = fused
        self._projections = Projections(self._kernels.gaussian if self._kernels else gaussian)
        settings = {
            "lr": lr,
            "rank": rank,
            "scale": scale,
            "scale_type": scale_type,
            "scale_front": scale_front,
            "update_proj_gap": update_proj_gap,
            "gamma": gamma,
            "projection": projection,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "seed": seed,
            "stacked": False,
        }
        super().__init__(params, settings)

    @cached_property
    def _kernels(self) -> Any:
        """The module of Triton's kernels, or None. Raises ValueError where they cannot run."""
        return _load_kernels() if self._fused else None

    @classmethod
    def split_groups(
        cls, model: nn.Module, groups: list[ParamGroup], args: Mapping[str, Any], **selection: Any
    ) -> list[ParamGroup]:
        """As the base class: `rank = 0` makes a group dense."""
        default = args.get("rank", cls.RANK)
        ranks = {group.get("rank", default) for group in groups}
        by_rank = {rank: apollo_param_groups(model, rank=rank, **selection) for rank in ranks}
        return split_by_kind(groups, lambda group: by_rank[group.get("rank", default)])

    @classmethod
    def matrices_in(cls, name: str, shape: Sequence[int], group: Mapping[str, Any]) -> list[Matrix]:
        """As the base class."""
        return matrices_of(name, shape, group["stacked"]) if group["rank"] else []

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
        plan = ChannelPlan([new], matrices)
        state = named_state.initial_state(plan, 0, settings) | {"step": torch.zeros(())}
        for shards, states in old:
            plans = [ChannelPlan([shard], matrices) for shard in shards]
            named_state.reshard(plans, [read(own) for own in states], plan, state)
        return state

    def _rules(self, group: ParamGroup) -> Rules:
        return {
            "lr": lambda lr: lr >= 0,
            "rank": lambda rank: type(rank) is int and rank >= 0,
            "scale": lambda scale: scale > 0,
            "scale_type": lambda kind: kind in ("channel", "tensor"),
            "scale_front": is_bool,
            "update_proj_gap": is_positive_int,
            "gamma": lambda gamma: gamma is None or gamma >= 1,
            "projection": lambda name: name in (*PROJECTIONS, "svd"),
            "betas": are_betas,
            "eps": lambda eps: eps > 0 or (eps == 0 and not group["rank"]),  # or N is 0 / 0
            "weight_decay": lambda decay: decay >= 0,
            "stacked": is_bool,
        }

    def _step(self, groups: Sequence[TensorGroup]) -> None:
        low_rank = [group for group in groups if isinstance(group, LowRank)]
        exchange = Exchange(groups)
        sent = [group.project() for group in low_rank]
        sent.append((~all_finite(groups)).float().expand(groups[0].world, 1))
        *received, failures = exchange.reduce_scatter(sent)
        is_finite = (failures == 0).squeeze()
        pairs = zip(low_rank, received, strict=True)
        sent = [group.adapt(own, is_finite) for group, own in pairs]
        is_cut = any(group.is_cut for group in groups)
        gathered = exchange.all_gather(sent) if is_cut else [own[None] for own in sent]
        for group, per_rank in zip(low_rank, gathered, strict=True):
            group.apply(per_rank, is_finite)
        for group in groups:
            if isinstance(group, Dense):
                group.update(is_finite)

    def step_metrics(self) -> dict[str, Tensor]:
        """Metrics of the last step, on the device, over the matrices that this rank has elements
        of: mean |N| / |R|, the fraction that the limiter reduced, and the steps skipped so far.

        With several low-rank groups also per group, with the group's number appended to the name.
        """
        by_group: dict[int, list[dict[str, Tensor]]] = {}
        for group in self._tensor_groups.values():
            if metrics := group.step_metrics():
                number = self._group_of[group.settings["param_names"][0]]
                by_group.setdefault(number, []).append(metrics)
        if not by_group:
            return {}
        means = _means([metrics for group in by_group.values() for metrics in group])
        for number, group in by_group.items() if len(by_group) > 1 else ():
            means |= {f"{key}/{number}": mean for key, mean in _means(group).items()}
        states = [state for state in self.state.values() if "calls" in state]
        skipped = torch.stack([state["calls"] - state["step"] for state in states]).max()
        return means | {"apollo/skipped": skipped}

    def _new_tensor_group(
        self, param_group: ParamGroup, stepped: list[tuple[Tensor, Shard]]
    ) -> TensorGroup:
        flats, shards = [flat for flat, _ in stepped], [shard for _, shard in stepped]
        if not param_group["rank"]:
            return Dense(flats, shards)
        matrices = {
            name: self.matrices_in(name, self._shapes[name], param_group)
            for name in param_group["param_names"]
        }
        return LowRank(flats, shards, matrices, self._projections, self._kernels)


class ApolloMini(Apollo):
    """APOLLO of rank 1 with one scale per matrix, which needs hardly any state."""

    RANK: ClassVar = 1
    __signature__ = inspect.signature(Apollo)

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, **settings: Any):
        """As Apollo, with other defaults: rank 1, scale 128, scale_type "tensor"."""
        defaults = {"rank": self.RANK, "scale": 128.0, "scale_type": "tensor"}
        super().__init__(params, lr, **(defaults | settings))


def _load_kernels() -> Any:
    """The module of Triton's kernels. Raises ValueError where they cannot run."""
    try:
        from harness.optim.apollo import kernels
    except ModuleNotFoundError:
        raise ValueError("fused = true needs triton, which comes with torch for CUDA") from None
    if not (is_gpu_used() or kernels.IS_INTERPRETED):
        raise ValueError("fused = true needs a GPU")
    return kernels


def _means(metrics: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The metrics of several tensor groups, over all matrices that this rank has elements of."""
    scale, limited, seen = (
        torch.cat([group[key] for group in metrics]) for key in ("scale", "limited", "seen")
    )
    count = seen.sum().clamp(min=1)
    return {
        "apollo/scale": torch.where(seen, scale, 0.0).sum() / count,
        "apollo/limited": (limited & seen).sum() / count,
    }
