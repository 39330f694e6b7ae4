"""Patches of DeepSpeed's classes, so that all ZeRO stages train alike."""

import importlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.torch_version import TorchVersion

from harness.errors import TaskError
from harness.waiting import waits
from harness.zero import fetches, module_values
from harness.zero.module_values import transforms_are_active
from harness.zero.norms import StepNorm, patch_norms

RUNTIME = "deepspeed.runtime"


@cache
def apply_patches() -> None:
    """Patches DeepSpeed in this process, once it has been imported."""
    _keep_optimizers_fresh()
    _accept_scalars()
    _accept_any_first_parameter()
    _let_tasks_gather()
    _patch_fetches()
    _attach_to_any_values()
    _allow_gradient_penalties()
    _let_timers_start_twice()
    _stay_at_the_smallest_scale()
    _find_duplicates_at_once()
    _time_collectives()
    patch_norms()


def _class(module: str, name: str) -> Any:
    """A class of DeepSpeed's runtime."""
    return getattr(importlib.import_module(f"{RUNTIME}.{module}"), name)


def _let_timers_start_twice() -> None:
    """`engine_state.start_backward_timers` has started some that DeepSpeed starts too."""
    timer = importlib.import_module("deepspeed.utils.timer").SynchronizedWallClockTimer.Timer
    start = timer.start
    timer.start = lambda self: None if self.started_ else start(self)


def _time_collectives() -> None:
    """How long a rank waits for the others in its backward, and in its optimizer's step."""
    backend: Any = importlib.import_module("deepspeed.comm.torch").TorchBackend
    for name in (
        *("all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "broadcast"),
        *("reduce_scatter_tensor", "all_gather", "all_gather_into_tensor", "all_gather_coalesced"),
        *("all_to_all", "all_to_all_single", "barrier"),
    ):
        setattr(backend, name, waits(getattr(backend, name)))


def _stay_at_the_smallest_scale() -> None:
    """At its smallest fp16 loss scale DeepSpeed ends the run with an exception at the first
    overflow, above stage 0: how many are too many is the health policy's decision."""
    scaler = _class("fp16.loss_scaler", "DynamicLossScaler")
    update = scaler.update_scale

    def update_scale(self: Any, overflow: bool) -> None:
        self.raise_error_at_min_scale = False
        update(self, overflow)

    scaler.update_scale = update_scale


def _find_duplicates_at_once() -> None:
    """That no parameter is in the optimizer twice is checked by looking for each of them in lists
    of all, made anew for each: 70 s for 30,000 parameters (DeepSpeed 0.19.8). A DeepSpeed that is
    newer than we know checks by itself."""
    engine = _class("engine", "DeepSpeedEngine")
    if TorchVersion(importlib.import_module("deepspeed").__version__) >= "0.20":
        return

    def check_for_duplicates(self: Any, optimizer: Any) -> None:
        counts = Counter(id(p) for group in optimizer.param_groups for p in group["params"])
        for name, parameter in self.module.named_parameters():
            count = counts[id(parameter)]
            assert count <= 1, f"parameter {name} occurs multiple times in optimizer.param_groups"

    engine._check_for_duplicates = check_for_duplicates


def _keep_optimizers_fresh() -> None:
    """The optimizer that an engine starts with is the one that was built.

    The wrappers of 16 bits at stage 0 take a step with zero gradients: steps are counted from 1,
    and weight decay is applied once more. ZeRO replaces an Adagrad by another one, without its
    parameter groups and hooks; and state that an optimizer has from the start, as Adagrad does,
    must follow the parameters to their masters.
    """
    fused = _class("fp16.fused_optimizer", "FP16_Optimizer")
    unfused = _class("fp16.unfused_optimizer", "FP16_UnfusedOptimizer")
    fused.initialize_optimizer_states = lambda self: None
    unfused.initialize_optimizer_states = _hand_state_to_masters
    for module, name in (
        ("zero.stage_1_and_2", "DeepSpeedZeroOptimizer"),
        ("zero.stage3", "DeepSpeedZeroOptimizer_Stage3"),
    ):
        kind = _class(module, name)
        kind.initialize_optimizer_states = _keeping_optimizer(kind.initialize_optimizer_states)


def _hand_state_to_masters(wrapper: Any) -> None:
    """Keys state that was made with the optimizer by the masters, in fp32."""
    state = wrapper.optimizer.state
    for weights, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
        for weight, master in zip(weights, masters, strict=True):
            if made := state.pop(weight, None):
                state[master] = {
                    key: value.to(master.dtype) if getattr(value, "shape", ()) else value
                    for key, value in made.items()
                }


def _keeping_optimizer(initialize: Any) -> Any:
    """`initialize_optimizer_states` that keeps the optimizer, with the state of the new one."""

    def initialize_optimizer_states(self: Any) -> None:
        optimizer = self.optimizer
        initialize(self)
        if self.optimizer is not optimizer:
            optimizer.state, self.optimizer = self.optimizer.state, optimizer

    return initialize_optimizer_states


def _accept_scalars() -> None:
    """Parameters without dimensions can be trained.

    To broadcast a parameter, its bytes are viewed, which torch refuses without a dimension; and the
    factor that clips gradients in fp32 at stage 0 has one. At stage 3 a parameter is gathered in
    the shape that was recorded when it was sharded.
    """
    engine = _class("engine", "DeepSpeedEngine")
    gathered = _class("zero.partition_parameters", "GatheredParameters")
    init = _class("zero.partition_parameters", "Init")
    broadcast, clip = engine._broadcast_model, engine.clip_fp32_gradients
    leave, shard = gathered._exit, init._zero_init_param

    def broadcast_model(self: Any) -> None:
        with _scalars_as_vectors(self.module.parameters()):
            broadcast(self)

    def clip_fp32_gradients(self: Any) -> None:
        if StepNorm.gradients is not None:
            StepNorm.gradients.clip(self.gradient_clipping())
            return
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        with _scalars_as_vectors(gradients):
            clip(self)

    def leave_gathered(self: Any, *error: Any) -> None:
        with _scalars_as_vectors(self.params):
            leave(self, *error)

    def shard_parameter(self: Any, parameter: Any) -> None:
        shape = parameter.shape
        with _scalars_as_vectors([parameter]):
            shard(self, parameter)
        parameter.ds_shape = shape

    engine._broadcast_model = broadcast_model
    engine.clip_fp32_gradients = clip_fp32_gradients
    gathered._exit = leave_gathered
    init._zero_init_param = shard_parameter


@contextmanager
def _scalars_as_vectors(tensors: Iterable[Tensor]) -> Iterator[None]:
    """In the block, tensors without dimensions have one of size 1, unless it shards them."""
    scalars = [tensor for tensor in tensors if not tensor.dim()]
    for scalar in scalars:
        scalar.data = scalar.data.view(1)
    yield
    for scalar in scalars:
        if scalar.numel():
            scalar.data = scalar.data.view(())


def _accept_any_first_parameter() -> None:
    """Stage 3 takes the first parameter's dtype for that of the model, and refuses integers."""
    offload = _class("zero.parameter_offload", "DeepSpeedZeRoOffload")
    shard = offload._convert_to_zero_parameters

    def shard_in_floating_dtype(self: Any, ds_config: Any, module: Any, mpu: Any) -> None:
        found = (p.dtype for p in module.parameters())
        floating = (torch.float32, torch.bfloat16, torch.float16)
        self.dtype = next((dtype for dtype in found if dtype in floating), self.dtype)
        shard(self, ds_config, module, mpu)

    offload._convert_to_zero_parameters = shard_in_floating_dtype


def _let_tasks_gather() -> None:
    """A task may gather parameters in a micro-batch for which all are gathered, and reads them."""
    gathered = _class("zero.partition_parameters", "GatheredParameters")
    enter, to_partition = gathered.__enter__, gathered._params_to_partition

    def enter_unless_changed(self: Any) -> None:
        if self.enabled and self.src_rank is not None and any(map(fetches.is_held, self.params)):
            raise TaskError(
                "weights were to be changed by GatheredParameters(..., modifier_rank=...) in a "
                "micro-batch for which they are gathered already, and the change would be lost: "
                "use `with engine.edit_weights() as model: ...`"
            )
        enter(self)

    def not_held(self: Any) -> list[Tensor]:
        return [p for p in to_partition(self) if not fetches.is_held(p)]

    gathered.__enter__ = enter_unless_changed
    gathered._params_to_partition = not_held


def _patch_fetches() -> None:
    """At stage 3, modules can have parameters without elements: DeepSpeed gathers nothing where
    there is no element to gather, and then misses the parameter. `functional_call` puts tensors
    into the place of parameters. A loss can be of a gradient: see `fetches.in_backward`. And if
    activation checkpointing calls a module again in its own backward, it keeps its weights."""
    module: Any = importlib.import_module(f"{RUNTIME}.zero.partitioned_param_coordinator")
    coordinator = module.PartitionedParameterCoordinator
    fetch, release = waits(coordinator._fetch_sub_module_impl), coordinator.release_sub_module
    get_all_parameters = module.get_all_parameters

    def sharded_parameters(submodule: Any, recurse: bool = False) -> Iterator[tuple[Any, Any]]:
        return (
            pair for pair in get_all_parameters(submodule, recurse) if hasattr(pair[1], "ds_id")
        )

    def fetch_sub_module(self: Any, submodule: Any, forward: bool, is_leaf: bool) -> None:
        if not forward and not fetches.Backward.is_running:
            self.is_differentiated = True
        for parameter in module.iter_params(submodule, recurse=is_leaf):
            if transforms_are_active() and not fetches.is_held(parameter):
                raise TaskError(
                    f"{type(submodule).__name__} was called inside of a function of torch.func, "
                    "like vmap or jacrev, where ZeRO 3 cannot gather its weights: set engines.NAME."
                    'unused_parameters = "zeros", which gathers the model for each micro-batch, or '
                    "use ZeRO 2"
                )
            if not parameter.ds_numel:
                parameter.data = parameter.data.new_empty(parameter.ds_shape)
                parameter.ds_status = module.ZeroParamStatus.AVAILABLE
        fetch(self, submodule, forward, is_leaf)

    def release_sub_module(self: Any, submodule: Any, forward: bool = False) -> None:
        in_backward = self._PartitionedParameterCoordinator__active_backward_submodules
        if not (forward and fetches.Backward.is_running and submodule.ds_id in in_backward):
            release(self, submodule, forward)

    module.get_all_parameters = sharded_parameters
    coordinator._fetch_sub_module_impl = fetch_sub_module
    coordinator.release_sub_module = release_sub_module
    coordinator.is_differentiated = False


def _attach_to_any_values() -> None:
    """See `module_values`."""
    module: Any = importlib.import_module(f"{RUNTIME}.zero.parameter_offload")
    register = module.DeepSpeedZeRoOffload._register_deepspeed_module
    module.apply_to_tensors_only = torch.compiler.disable(module_values.attach)
    module.vars = lambda value: getattr(value, "__dict__", {})  # an int has none

    def register_module(self: Any, submodule: Any, *args: Any, **kwargs: Any) -> None:
        register(self, submodule, *args, **kwargs)
        on_output = self.backward_hooks[-2]  # before those of the user, which may keep the output
        submodule._forward_hooks.move_to_end(on_output.id, last=False)
        follow = torch.compiler.disable(module_values.follow_forward)  # as DeepSpeed's hooks
        self.backward_hooks.append(submodule.register_forward_hook(follow, with_kwargs=True))

    module.DeepSpeedZeRoOffload._register_deepspeed_module = register_module


def _allow_gradient_penalties() -> None:
    """`torch.autograd.grad` may go through what an engine has returned, as for a gradient penalty.

    DeepSpeed takes the first gradient that reaches an output for the beginning of a backward: it
    then fails at stage 0, reduces too early at stages 1 and 2, and divides the gradient by the
    number of accumulated micro-batches.
    """
    manager = _class("utils", "OutputBackwardHookManager")
    make_hook = manager._make_backward_hook

    def make_backward_hook(self: Any, output: Tensor) -> Callable[[Tensor], Tensor]:
        hook, engine = make_hook(self, output), self.preprocess_per_tensor_fn.__self__

        def on_gradient(gradient: Tensor) -> Tensor:
            if engine._running_engine_backward:
                return hook(gradient)
            if _reaches_a_parameter(engine.module):
                raise TaskError(
                    "a loss was back-propagated in the feeder, by `loss.backward()`: return it "
                    "from the feeder instead"
                )
            return gradient

        return on_gradient

    manager._make_backward_hook = make_backward_hook


def _reaches_a_parameter(module: torch.nn.Module) -> bool:
    """Whether the backward in progress will add to a parameter's gradient."""
    will_run = torch._C._will_engine_execute_node  # as in DeepSpeed's runtime/utils.py
    nodes = [get_gradient_edge(p).node for p in module.parameters() if p.requires_grad]
    try:
        return any(map(will_run, nodes))
    except RuntimeError:  # of a leaf that `torch.autograd.grad` was asked for
        return False
