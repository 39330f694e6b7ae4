"""An optimizer that knows which parameters are in the tensors that DeepSpeed has it step."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from harness.optim.sharded.settings import Rules, check_settings
from harness.optim.sharded.tensor_groups import ParamGroup, State, TensorGroup
from harness.zero.parameters import full_shape
from harness.zero.shards import Shard, locate


class ShardedOptimizer(torch.optim.Optimizer):
    """Stand-alone, or DeepSpeed's client optimizer, whose flat tensors it maps to the parameters.

    A subclass says what the tensors of a parameter group do in a step.
    """

    TITLE: ClassVar[str]
    """What errors call it."""
    MARK: ClassVar[str]
    """A setting that only its own parameter groups have."""
    REMEDY: ClassVar[str] = "use load_named_state to load the moments of an AdamW"
    """If it is given the state of another optimizer."""
    IS_ELEMENTWISE: ClassVar[bool] = False
    """Whether all state has the size of the weights, and can be split at any element."""
    STATE_SETTINGS: ClassVar[tuple[str, ...]] = ()
    """Settings that the shapes of the state depend on, which a resumed run must not change."""
    COUNTERS: ClassVar[tuple[str, ...]] = ("step",)
    """The numbers in the state, which count alike for all parameters of a group."""
    RENEWED: ClassVar[Mapping[str, Any]] = {}
    """Entries of the state of a group that has got another matrix: so its flats compute at the next
    step what it lacks, and with it the same for the others."""
    SELECTION: ClassVar[tuple[str, ...]]
    """The arguments of `split_groups` that a config may set."""
    GROUP_ONLY: ClassVar[tuple[str, ...]] = ()
    """Settings of parameter groups that are not arguments of the constructor."""
    COPIED: ClassVar[tuple[str, ...]] = ("_parameters", "_shapes", "_group_of", "_loaded")
    """Attributes that a copy has besides torch's."""

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]):
        self._parameters: dict[str, Tensor] = {}
        self._shapes: dict[str, torch.Size] = {}
        self._group_of: dict[str, int] = {}
        self._tensor_groups: dict[tuple[int, ...], TensorGroup] = {}
        self._located: dict[tuple[int, ...], tuple[ParamGroup, list[Tensor], list[Shard]]] = {}
        self._loaded: dict[str, Tensor] = {}
        """Loaded state by name that no tensor has taken over yet."""
        super().__init__(params, defaults)

    @classmethod
    @abstractmethod
    def split_groups(
        cls, model: nn.Module, groups: list[ParamGroup], args: Mapping[str, Any], **selection: Any
    ) -> list[ParamGroup]:
        """Groups with their parameters by name as `params`, each split into matrices, stacks of
        matrices, and the rest. `args`: the constructor's."""

    @classmethod
    @abstractmethod
    def matrices_in(cls, name: str, shape: Sequence[int], group: Mapping[str, Any]) -> list[Any]:
        """The matrices of a parameter in a group; none if it is dense. Raises ValueError for a
        parameter that does not fit its group."""

    @classmethod
    def resharded(
        cls,
        old: Iterable[tuple[Sequence[Shard], Sequence[State]]],
        read: Callable[[State], State],
        new: Shard,
        matrices: Mapping[str, Sequence[Any]],
        settings: ParamGroup,
        load: list[float],
    ) -> State:
        """The state of a flat of matrices in a new layout, for optimizers that are not elementwise.

        `old`: for each flat of the old layout that has some of them, its shards, and its states by
        rank; `read` brings such a state into memory. `matrices`: of each parameter of these flats,
        by parameter name. `load`: the work of each rank, to which this flat's is added.
        """
        raise NotImplementedError

    @abstractmethod
    def _rules(self, group: ParamGroup) -> Rules:
        """Which values of a parameter group's settings are valid."""

    @abstractmethod
    def _new_tensor_group(
        self, param_group: ParamGroup, stepped: list[tuple[Tensor, Shard]]
    ) -> TensorGroup:
        """The tensors of a parameter group to step together."""

    @abstractmethod
    def _step(self, groups: Sequence[TensorGroup]) -> None:
        """Steps tensor groups that have begun. Collective where parameters are sharded."""

    def add_param_group(self, param_group: ParamGroup) -> None:
        """As torch's. Parameters without names are named `GROUP.INDEX`; the state by name, and
        random projections, depend on the names."""
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        if not any(isinstance(parameter, tuple) for parameter in params):
            number = len(self.param_groups)
            names = [f"{number}.{index}" for index in range(len(params))]
            param_group = {"param_names": names} | param_group
        super().add_param_group(param_group | {"params": params})
        group = self.param_groups[-1]
        check_settings(group, self._rules(group))
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            if name in self._parameters:
                raise ValueError(f"two parameters are named {name!r}")
            self._parameters[name], self._shapes[name] = parameter, full_shape(parameter)
            self.matrices_in(name, self._shapes[name], group)
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
        if groups := self._begin():
            self._step(groups)
        return loss

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
        self._forget_plans()
        self._loaded = dict(state)

    def state_dict(self) -> dict[str, Any]:
        """As torch's. Raises RuntimeError while state loaded by name has not been taken over."""
        names = [key.removesuffix("/step") for key in self._loaded if key.endswith("/step")]
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
        if any(self.MARK not in group for group in state_dict["param_groups"]):
            raise ValueError(f"this is not the state of {self.TITLE}: {self.REMEDY}")
        super().load_state_dict(state_dict)
        self._forget_plans()
        self._loaded = {}
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        flats = [flat for group in self.param_groups for flat in group["params"]]
        for number, flat in zip(saved, flats, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    self.state[flat][key] = value.to(flat.device, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        """Of `copy.deepcopy` and `pickle`: plans belong to the original's tensors."""
        return super().__getstate__() | {name: getattr(self, name) for name in self.COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_parameters" in state:  # not so in load_state_dict, which calls this too
            self._located = {}
            self._forget_plans()

    def _forget_plans(self) -> None:
        """Drops what depends on the state."""
        self._tensor_groups = {}

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
