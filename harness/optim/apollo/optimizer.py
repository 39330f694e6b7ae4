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

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from harness.optim.apollo.channels import matrices_of
from harness.optim.apollo.exchange import Exchange
from harness.optim.apollo.lowrank import LowRank
from harness.optim.apollo.projections import PROJECTIONS, Projections
from harness.optim.apollo.tensor_groups import Dense, ParamGroup, TensorGroup
from harness.zero.parameters import full_shape
from harness.zero.shards import Shard, locate


class Apollo(torch.optim.Optimizer):
    """APOLLO for matrices, AdamW for the rest; stand-alone, or as DeepSpeed's client optimizer.

    A parameter group with `rank = 0` is dense AdamW; `apollo_param_groups` builds the groups of a
    model. A group with `stacked = True` has stacks of matrices, one matrix per expert. State per
    stepped tensor: `exp_avg` and `exp_avg_sq` of shape (channels on this rank, rank), `limiter`
    (matrices,), `step` (), and the int `calls`.
    """

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
    ):
        """`scale`: alpha; its square root multiplies the update (with `scale_front`, before the
        limiter).

        `gamma`: the largest factor by which the update's norm may grow per step; None or inf: no
        limiter. `eps` is added before the bias correction for matrices, after it for dense AdamW.
        `projection`: "svd" computes P from the gradient at each refresh (spectral.py), and each
        rank stores it for the matrices that it has elements of, as `projection` (any, rank). Raises
        ValueError for invalid settings, and for a group of rank > 0 with a parameter that is not a
        matrix.
        """
        self._parameters: dict[str, Tensor] = {}
        self._shapes: dict[str, torch.Size] = {}
        self._group_of: dict[str, int] = {}
        self._tensor_groups: dict[tuple[int, ...], TensorGroup] = {}
        self._located: dict[tuple[int, ...], tuple[ParamGroup, list[Tensor], list[Shard]]] = {}
        self._projections = Projections()
        self._loaded: dict[str, Tensor] = {}
        """Loaded state by name that no tensor has taken over yet."""
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

    def add_param_group(self, param_group: ParamGroup) -> None:
        """As torch's. Parameters without names are named `GROUP.INDEX`; P depends on the names."""
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        if not any(isinstance(parameter, tuple) for parameter in params):
            number = len(self.param_groups)
            names = [f"{number}.{index}" for index in range(len(params))]
            param_group = {"param_names": names} | param_group
        super().add_param_group(param_group | {"params": params})
        group = self.param_groups[-1]
        _check(group)
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            if name in self._parameters:
                raise ValueError(f"two parameters are named {name!r}")
            shape = full_shape(parameter)
            if group["rank"]:
                matrices_of(name, shape, group["stacked"])
            self._parameters[name], self._shapes[name] = parameter, shape
            self._group_of[name] = len(self.param_groups) - 1

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step. Collective where parameters are sharded; the first may raise ShardError."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.state and self._is_probe():
            return loss
        groups = self._begin()
        if not groups:
            return loss
        exchange = Exchange(groups)
        sent = [group.project() for group in groups]
        failed = ~torch.stack([group.square_sum() for group in groups]).sum().isfinite()
        sent.append(failed.float().expand(groups[0].world, 1))
        *received, failures = exchange.reduce_scatter(sent)
        all_finite = (failures == 0).squeeze()
        sent = [group.adapt(own, all_finite) for group, own in zip(groups, received, strict=True)]
        is_cut = any(group.is_cut for group in groups)
        gathered = exchange.all_gather(sent) if is_cut else [own[None] for own in sent]
        for group, per_rank in zip(groups, gathered, strict=True):
            group.apply(per_rank, all_finite)
        return loss

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

    def named_state(self) -> dict[str, Tensor]:
        """The state by parameter and matrix name, complete and layout-independent, on the CPU of
        every rank: `NAME/exp_avg` and so on, ready for a .sft file.

        Empty before the first step. Collective where parameters are sharded: call it on every rank.
        """
        named = dict(self._loaded)
        for param_group, flats, shards in self._located.values():
            pairs = zip(flats, shards, strict=True)
            stepped = [(flat, shard) for flat, shard in pairs if flat in self.state]
            if stepped:
                states = [self.state[flat] for flat, _ in stepped]
                items = self._new_tensor_group(param_group, stepped).named_state(states)
                named |= {name: value.cpu().clone() for name, value in items}
        return named

    def load_named_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `named_state` returned, on any number of ranks and at any ZeRO stage.

        Each tensor takes over its entries at its next step. `exp_avg`, `exp_avg_sq` and `step` of
        an AdamW fit dense parameters; where an entry does not match, it is dropped with a warning.
        """
        self.state.clear()
        self._loaded = dict(state)

    def state_dict(self) -> dict[str, Any]:
        """As torch's. Raises RuntimeError while state loaded by name has not been taken over."""
        names = [key.removesuffix("/exp_avg") for key in self._loaded if key.endswith("/exp_avg")]
        if waiting := [n for n in names if {n, n.rpartition("[")[0]} & self._parameters.keys()]:
            raise RuntimeError(
                "state_dict() is incomplete: a parameter takes over state loaded by name at the "
                "next step that has a gradient for it; until then save named_state(). Pending: "
                f"{', '.join(waiting)}"
            )
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but state tensors keep their dtype, even for 16-bit parameters.

        Raises ValueError for the state of another optimizer.
        """
        if any("rank" not in group for group in state_dict["param_groups"]):
            raise ValueError(
                "this is not the state of an APOLLO optimizer: use load_named_state to load the "
                "moments of an AdamW"
            )
        super().load_state_dict(state_dict)
        self._loaded = {}
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        flats = [flat for group in self.param_groups for flat in group["params"]]
        for number, flat in zip(saved, flats, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    self.state[flat][key] = value.to(flat.device, copy=True)

    def _is_probe(self) -> bool:
        """Whether this is not a real step: DeepSpeed's FP16_UnfusedOptimizer calls `step` in its
        constructor, with zero gradients, to allocate state."""
        gradients = []
        for group in self.param_groups:
            for flat, shard in zip(group["params"], self._locate(group), strict=True):
                if shard.group is not None or self._parameters[shard.own[0].name] is flat:
                    return False
                gradients.append(flat.grad)
        return not any(bool(gradient.any()) for gradient in gradients if gradient is not None)

    def _locate(self, param_group: ParamGroup) -> list[Shard]:
        """What each tensor of a group holds; cached. The first call is collective and may raise
        ShardError."""
        flats = param_group["params"]
        if not flats:
            return []
        key = tuple(map(id, flats))
        if key not in self._located:
            parameters = {name: self._parameters[name] for name in param_group["param_names"]}
            self._located[key] = param_group, list(flats), locate(flats, parameters)
        return self._located[key][2]

    def _begin(self) -> list[TensorGroup]:
        """The tensor groups with gradients, prepared for this step."""
        groups = []
        for param_group in self.param_groups:
            pairs = zip(param_group["params"], self._locate(param_group), strict=True)
            stepped = [(flat, shard) for flat, shard in pairs if flat.grad is not None]
            if stepped:
                group = self._tensor_group(param_group, stepped)
                states = [self.state[flat] for flat in group.flats]
                group.begin(param_group, states, self._loaded)
                groups.append(group)
        return groups

    def _tensor_group(
        self, param_group: ParamGroup, stepped: list[tuple[Tensor, Shard]]
    ) -> TensorGroup:
        """The tensor group of the last step if it has the same tensors, otherwise a new one."""
        key = tuple(map(id, param_group["params"]))
        group = self._tensor_groups.get(key)
        if group is None or list(map(id, group.flats)) != [id(flat) for flat, _ in stepped]:
            group = self._tensor_groups[key] = self._new_tensor_group(param_group, stepped)
        return group

    def _new_tensor_group(
        self, param_group: ParamGroup, stepped: list[tuple[Tensor, Shard]]
    ) -> TensorGroup:
        flats, shards = [flat for flat, _ in stepped], [shard for _, shard in stepped]
        if not param_group["rank"]:
            return Dense(flats, shards)
        matrices = {
            name: matrices_of(name, self._shapes[name], param_group["stacked"])
            for name in param_group["param_names"]
        }
        return LowRank(flats, shards, matrices, self._projections)


class ApolloMini(Apollo):
    """APOLLO of rank 1 with one scale per matrix, which needs hardly any state."""

    RANK: ClassVar = 1

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, **settings: Any):
        """As Apollo, with other defaults: rank 1, scale 128, scale_type "tensor"."""
        defaults = {"rank": self.RANK, "scale": 128.0, "scale_type": "tensor"}
        super().__init__(params, lr, **(defaults | settings))


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


def _check(group: ParamGroup) -> None:
    """Raises ValueError for invalid settings of a parameter group."""
    beta1, beta2 = group["betas"]
    allowed = {
        "lr": group["lr"] >= 0,
        "rank": type(group["rank"]) is int and group["rank"] >= 0,
        "scale": group["scale"] > 0,
        "scale_type": group["scale_type"] in ("channel", "tensor"),
        "update_proj_gap": isinstance(group["update_proj_gap"], int)
        and group["update_proj_gap"] > 0,
        "gamma": group["gamma"] is None or group["gamma"] >= 1,
        "projection": group["projection"] in (*PROJECTIONS, "svd"),
        "betas": 0 <= beta1 < 1 and 0 <= beta2 < 1,
        "eps": group["eps"] > 0 or (group["eps"] == 0 and not group["rank"]),  # or N is 0 / 0
        "weight_decay": group["weight_decay"] >= 0,
    }
    for key, is_allowed in allowed.items():
        if not is_allowed:
            raise ValueError(f"{key} = {group[key]!r} is not valid")
