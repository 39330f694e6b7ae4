"""An optimizer from its table in the config."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from harness.config.engine_sections import OptimizerConfig
from harness.devices import is_gpu_used
from harness.errors import ConfigError, did_you_mean
from harness.optim.arguments import check_arguments
from harness.optim.param_groups import Named, parameters_by_group, without_decay
from harness.optim.registry import OPTIMIZERS, optimizer_class
from harness.optim.sharded.optimizer import ShardedOptimizer

IMPLEMENTATIONS = {"foreach", "fused", "capturable", "differentiable"}
"""Arguments of torch's AdamW that choose one."""


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, deepspeed: Mapping[str, Any] | None = None
) -> Optimizer:
    """The optimizer that the config names, for the trainable parameters of a model.

    `deepspeed`: the config of the engine that is to step it, if any. With `groups` or `no_decay`,
    each of torch's parameter groups has the `name` of the group in the config that it belongs to;
    several may have the same name. APOLLO, Muon and SOAP also take the arguments that say which
    parameters are matrices. Raises ConfigError for an unknown name or unknown arguments, for a
    group without parameters, and if the optimizer rejects its arguments.
    """
    kind: Any = optimizer_class(config.name)
    args = dict(config.args) | _fused(config, deepspeed or {})
    is_sharded = bool(issubclass(kind, ShardedOptimizer))
    spec = OPTIMIZERS.get(config.name)
    constructor: Any = (spec and spec.make) or kind
    extra = kind.SELECTION if is_sharded else ()
    check_arguments(f"optimizer {config.name!r}", constructor, args, extra)
    selection: dict[str, Any] = {key: args.pop(key) for key in extra if key in args}
    has_groups = bool(config.groups) or config.no_decay
    try:
        if spec is not None and spec.make is not None:
            if has_groups:
                raise ConfigError("groups and no_decay are not supported: it makes its own groups")
            return spec.make(model, lr=config.lr, **args)
        if not (has_groups or is_sharded):
            trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
            return kind(trainable, lr=config.lr, **args)
        defaults = kind([nn.Parameter(torch.zeros(2, 2))], lr=config.lr, **args).defaults
        _check_groups(config, kind, args, defaults)
        groups = _torch_groups(model, config)
        if is_sharded:
            groups = kind.split_groups(model, groups, args | {"lr": config.lr}, **selection)
        if config.no_decay:
            groups = without_decay(groups, defaults["weight_decay"])
        return kind([_listed(group, is_sharded) for group in groups], lr=config.lr, **args)
    except Exception as error:  # an optimizer may raise any exception for wrong arguments
        raise ConfigError(f"optimizer {config.name!r}: {error}") from error


def _fused(config: OptimizerConfig, deepspeed: Mapping[str, Any]) -> dict[str, Any]:
    """AdamW's argument for torch's fused kernel where ZeRO has it step shards in host memory, which
    takes a quarter to a seventh of the time of torch's own choice there.

    Not at stage 0, where it steps the model's parameters: torch's kernel for CPUs silently mixes up
    the elements of a gradient whose strides are not the weight's. ZeRO's shards are contiguous.
    """
    zero = deepspeed.get("zero_optimization", {})
    offload = zero.get("offload_optimizer") or {}
    is_on_host = not is_gpu_used() or offload.get("device") == "cpu"
    is_chosen = bool(IMPLEMENTATIONS & config.args.keys())
    is_fused = config.name == "adamw" and zero.get("stage", 0) and is_on_host and not is_chosen
    return {"fused": True} if is_fused else {}


def configured_keys(config: OptimizerConfig, optimizer: Optimizer) -> set[str]:
    """The settings of parameter groups that the config decides, whatever a checkpoint has.

    A key that is removed from a group falls back to the optimizer's own, except in optimizers that
    keep state in their groups (schedule-free ones).
    """
    keys = {"lr", "name", *config.args}
    for group in config.groups:
        keys |= group.args.keys()
    is_stateless = isinstance(optimizer, ShardedOptimizer) or type(optimizer).__module__.startswith(
        "torch."
    )
    return keys | (optimizer.defaults.keys() if config.groups and is_stateless else set())


def _torch_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Torch's groups, with their settings and the parameters by name as `params`."""
    settings = {g.name: g.args | {"lr": g.rate(config.lr)} for g in config.groups}
    has_names = bool(config.groups) or config.no_decay
    return [
        ({"name": name} if has_names else {}) | {"params": named} | settings.get(name, {})
        for name, named in parameters_by_group(model, config.groups).items()
    ]


def _listed(group: dict[str, Any], with_names: bool) -> dict[str, Any]:
    named: Named = group["params"]
    names = {"param_names": list(named)} if with_names else {}
    return group | {"params": list(named.values())} | names


def _check_groups(
    config: OptimizerConfig, kind: Any, args: Mapping[str, Any], defaults: Mapping[str, Any]
) -> None:
    """Raises ConfigError for an option of a group that the optimizer does not have, or rejects."""
    if config.no_decay and "weight_decay" not in defaults:
        raise ConfigError("no_decay: it has no weight_decay")
    group_only = kind.GROUP_ONLY if issubclass(kind, ShardedOptimizer) else ()
    for group in config.groups:
        for key in group.args:
            if key not in defaults:
                raise ConfigError(
                    f"group {group.name!r}: unknown key {key!r}{did_you_mean(key, defaults)}; "
                    f"known: {', '.join(defaults)}"
                )
        try:  # torch checks the optimizer's own settings only, not those of a group
            of_group = {key: v for key, v in group.args.items() if key not in group_only}
            kind([nn.Parameter(torch.zeros(2, 2))], **{**args, **of_group, "lr": config.lr})
        except Exception as error:
            raise ConfigError(f"group {group.name!r}: {error}") from error
