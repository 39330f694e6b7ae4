"""An optimizer of matrices, each of which is computed by its owner, and AdamW for the rest."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from harness.optim.apollo.channels import Matrix, matrices_of
from harness.optim.matrices.exchange import Exchange
from harness.optim.matrices.groups import MatrixGroup, may_branch
from harness.optim.matrices.param_groups import matrix_param_groups
from harness.optim.sharded.elementwise import Dense
from harness.optim.sharded.optimizer import ShardedOptimizer
from harness.optim.sharded.param_groups import split_by_kind
from harness.optim.sharded.settings import (
    Rules,
    are_betas,
    check_settings,
    is_bool,
    is_positive_int,
)
from harness.optim.sharded.tensor_groups import ParamGroup, TensorGroup, all_finite, common_shard
from harness.zero.shards import Shard

GROUP_DEFAULTS: dict[str, Any] = {"dense": False, "stacked": False, "heads": 1}
"""Settings of parameter groups that say what is a matrix."""


class MatrixOptimizer(ShardedOptimizer):
    """Steps matrices at their owners: `outgoing` -> all-to-all -> `solve` -> all-to-all -> `apply`.

    If a gradient (or its square) is not finite on any rank, all ranks skip the step. A parameter
    group with `dense = True` is AdamW; in one with `stacked = True` a parameter is a stack of
    matrices along its first dimension, and with `heads = n` it is n matrices of equal numbers of
    rows.
    """

    SELECTION = ("matrices", "dense", "stacked", "heads")
    GROUP_ONLY = tuple(GROUP_DEFAULTS)
    COPIED = (*ShardedOptimizer.COPIED, "_dtype", "_adam_lr")
    GROUP: ClassVar[type[MatrixGroup]]

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        dtype: torch.dtype | None,
        adam_lr: float | None,
    ):
        """`dtype`: of the computation; None: bf16 on GPUs and fp32 on CPUs. `adam_lr`: learning
        rate of dense groups that have none of their own; None: `lr`."""
        check_settings({"adam_lr": adam_lr}, {"adam_lr": lambda lr: lr is None or lr >= 0})
        self._dtype, self._adam_lr = dtype, adam_lr
        self._loads: dict[int, list[float]] = {}
        """By process group: the work of each rank."""
        self._exchanges: dict[tuple[int, ...], tuple[list[TensorGroup], Exchange]] = {}
        super().__init__(params, defaults | GROUP_DEFAULTS)

    @classmethod
    def split_groups(
        cls, model: nn.Module, groups: list[ParamGroup], args: Mapping[str, Any], **selection: Any
    ) -> list[ParamGroup]:
        """As the base class: a group with `dense = True` is dense. A group's own learning rate
        keeps its ratio to `lr` in its dense part too."""
        kinds = matrix_param_groups(model, **selection)

        def kinds_of(group: ParamGroup) -> list[ParamGroup]:
            check_settings(group, {"dense": is_bool} if "dense" in group else {})
            if group.get("dense"):
                return [kind | {"dense": True, "stacked": False, "heads": 1} for kind in kinds]
            return kinds

        split = split_by_kind(groups, kinds_of)
        adam_lr, lr = args.get("adam_lr"), args["lr"]
        if adam_lr is None:
            return split
        return [
            group | {"lr": adam_lr * (group.get("lr", lr) / lr if lr else 1.0)}
            if group["dense"]
            else group
            for group in split
        ]

    def add_param_group(self, param_group: ParamGroup) -> None:
        """As the base class."""
        if param_group.get("dense") and self._adam_lr is not None:
            param_group = {"lr": self._adam_lr} | param_group
        super().add_param_group(param_group)

    def _rules(self, group: ParamGroup) -> Rules:
        return {
            "lr": lambda lr: lr >= 0,
            "betas": are_betas,
            "eps": lambda eps: eps >= 0,
            "weight_decay": lambda decay: decay >= 0,
            "dense": is_bool,
            "stacked": is_bool,
            "heads": is_positive_int,
        }

    @classmethod
    def matrices_in(cls, name: str, shape: Sequence[int], group: Mapping[str, Any]) -> list[Matrix]:
        """As the base class."""
        return [] if group["dense"] else group_matrices(name, shape, group)

    def _new_tensor_group(
        self, param_group: ParamGroup, stepped: list[tuple[Tensor, Shard]]
    ) -> TensorGroup:
        flats, shards = [flat for flat, _ in stepped], [shard for _, shard in stepped]
        if param_group["dense"]:
            return Dense(flats, shards)
        shard = shards[0]
        load = self._loads.setdefault(id(shard.group), [0.0] * len(shard.segments))
        matrices = {
            name: self.matrices_in(name, self._shapes[name], param_group)
            for name in param_group["param_names"]
        }
        group = self.GROUP(flats, shards, matrices, load, torch.float32)
        group.dtype = self.dtype_on(group.compute_device)
        group.settings = param_group
        return group

    @abstractmethod
    def dtype_on(self, device: torch.device) -> torch.dtype:
        """The dtype in which matrices are computed, and sent."""

    def _step(self, groups: Sequence[TensorGroup]) -> None:
        of_matrices = [group for group in groups if isinstance(group, MatrixGroup)]
        exchange = self._exchange(groups, of_matrices)
        held = [piece for group in of_matrices for piece in group.outgoing()]
        arrived, is_finite = exchange.to_owners(held, all_finite(groups))
        del held
        if may_branch(is_finite) and not is_finite:
            for group in groups:
                group.end()
            return
        solved: list[Tensor] = []
        for group in of_matrices:
            own = arrived[len(solved) : len(solved) + group.owned_pieces]
            solved += group.solve(own, is_finite)
        del arrived
        updates = exchange.to_holders(solved)
        for group in of_matrices:
            group.apply(updates[: group.held_pieces], is_finite.to(group.device))
            updates = updates[group.held_pieces :]
        for group in groups:
            if isinstance(group, Dense):
                group.update(is_finite.to(group.device))

    def _exchange(self, groups: Sequence[TensorGroup], of_matrices: list[MatrixGroup]) -> Exchange:
        """The collectives of a step of these groups; cached, with the groups, whose ids are the
        key."""
        key = tuple(map(id, groups))
        if key not in self._exchanges:
            current = {id(group) for group in self._tensor_groups.values()}
            self._exchanges = {k: v for k, v in self._exchanges.items() if current.issuperset(k)}
            plans = [plan for group in of_matrices for plan in group.plans]
            shard = common_shard(groups)
            device = shard.device if shard.group is not None else groups[0].device
            assert device is not None
            exchange = Exchange(plans, shard, device, self.dtype_on(device))
            self._exchanges[key] = list(groups), exchange
        return self._exchanges[key][1]

    def _forget_plans(self) -> None:
        super()._forget_plans()
        self._loads, self._exchanges = {}, {}


def group_matrices(name: str, shape: Sequence[int], group: Mapping[str, Any]) -> list[Matrix]:
    """The matrices of a parameter of a group. Raises ValueError if it cannot be what it says."""
    heads, stacked = group.get("heads", 1), group.get("stacked", False)
    if heads > 1:
        if stacked or len(shape) < 2 or shape[0] % heads:
            raise ValueError(
                f"parameter {name!r} of shape {tuple(shape)} cannot be split into heads = {heads} "
                "blocks of rows"
            )
        shape, stacked = (heads, shape[0] // heads, *shape[1:]), True
    return matrices_of(name, shape, stacked, "dense = True, as matrix_param_groups does")
