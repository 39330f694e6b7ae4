"""What DeepSpeed leaves of an engine: on the model, and in its own modules and classes."""

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

OFFLOAD = "deepspeed.runtime.zero.parameter_offload"
SHARDED = {"ds_id", "ds_shape"}
"""What still tells a parameter that stage 3 has left in shards."""
ON_MODULES = ("ds_inflight_param_registry", "pre_bwd_fn", "post_bwd_fn")
"""What stage 3 leaves on modules that refers to its engine."""


def attributes_of(model: nn.Module) -> dict[nn.Parameter, set[str]]:
    """The names of the attributes that the parameters of a model have of their own."""
    return {parameter: set(vars(parameter)) for parameter in model.parameters()}


def take_off(ds: Any, before: Mapping[nn.Parameter, set[str]]) -> None:
    """Takes an engine that is destroyed off its model: its hooks, and what refers to it and to its
    process groups, which would live, with their threads, as long as the model. So that others can
    train it, copy it, or pickle it. `before`: its `attributes_of`, before DeepSpeed had it."""
    for hook in (ds.module_forward_pre_hook, ds.module_forward_post_hook):
        if hook is not None:
            hook.remove()
    for module in ds.module.modules():
        for name in ON_MODULES:
            vars(module).pop(name, None)
    for parameter in ds.module.parameters():
        is_sharded = "ds_id" in vars(parameter)
        own = before.get(parameter, set())
        for name in set(vars(parameter)) - (SHARDED if is_sharded else own):
            delattr(parameter, name)


def forget() -> None:
    """Drops it, once all engines are closed: weights, and with them process groups and threads."""
    module = importlib.import_module(OFFLOAD)
    module.FWD_MODULE_STACK.clear()  # in whose forward it believes to be
    coordinator = module.PartitionedParameterCoordinator
    release = coordinator._PartitionedParameterCoordinator__params_to_release
    inspect.getclosurevars(release).nonlocals["func"].cache_clear()  # `self` is part of its key
