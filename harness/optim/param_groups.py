"""Which parameters get settings of their own: `optimizer.groups` and `optimizer.no_decay`."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from torch import nn

from harness.config.engine_sections import (
    DEFAULT_GROUP,
    EngineConfig,
    OptimizerConfig,
    ParameterGroupConfig,
)
from harness.errors import ConfigError, did_you_mean, first_few
from harness.utils import enclosing_names
from harness.zero.parameters import full_shape

Named = dict[str, nn.Parameter]


def with_groups(config: EngineConfig, groups: Iterable[Mapping[str, Any]]) -> EngineConfig:
    """An engine's config with further groups, a task's, after its own. Raises ConfigError."""
    assert config.optimizer is not None
    try:
        added = [ParameterGroupConfig.model_validate(dict(group)) for group in groups]
        table = config.optimizer.model_dump() | {"groups": [*config.optimizer.groups, *added]}
        optimizer = OptimizerConfig.model_validate(table)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{key}: {first['msg'].removeprefix('Value error, ')}") from None
    return config.model_copy(update={"optimizer": optimizer})


def parameters_by_group(
    model: nn.Module, groups: Sequence[ParameterGroupConfig]
) -> dict[str, Named]:
    """The trainable parameters by name, by group; the default group first, if it has any.

    A tied parameter matches by any of its names. Raises ConfigError for a group without parameters.
    """
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(parameter, []).append(name)
    chosen: dict[str, Named] = {DEFAULT_GROUP: {}, **{group.name: {} for group in groups}}
    for parameter, own in names.items():
        owners = (group.name for group in groups if _matches(group.match, own))
        chosen[next(owners, DEFAULT_GROUP)][own[0]] = parameter
    for group in groups:
        if not chosen[group.name]:
            raise ConfigError(_no_parameter(group, model))
    return {name: parameters for name, parameters in chosen.items() if parameters}


def without_decay(groups: Iterable[dict[str, Any]], weight_decay: float) -> list[dict[str, Any]]:
    """The groups, with vectors (biases, norms; at most one dimension) in groups of their own, whose
    weight decay is 0. `weight_decay`: of groups that have none.

    `groups`: torch's, with the parameters by name as `params`.
    """
    split = []
    for group in groups:
        named: Named = group["params"]
        vectors = {n: p for n, p in named.items() if len(full_shape(p)) < 2}
        if not group.get("weight_decay", weight_decay) or not vectors:
            split.append(group)
            continue
        matrices = {n: p for n, p in named.items() if n not in vectors}
        if matrices:
            split.append(group | {"params": matrices})
        split.append(group | {"params": vectors, "weight_decay": 0.0})
    return split


def _matches(pattern: str, names: Iterable[str]) -> bool:
    return any(re.fullmatch(pattern, each) for name in names for each in enclosing_names(name))


def _no_parameter(group: ParameterGroupConfig, model: nn.Module) -> str:
    """Why a group has no parameters."""
    text = f"optimizer.groups: group {group.name!r}: match = {group.match!r}"
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    matched = [name for name in names if _matches(group.match, [name])]
    if not matched:
        known = dict.fromkeys(each for name in names for each in enclosing_names(name))
        hint = did_you_mean(group.match.replace("\\", ""), known)
        return f"{text} matches no parameter{hint}; the model has: {first_few(names, 20)}"
    if not any(model.get_parameter(name).requires_grad for name in matched):
        return f"{text} matches only frozen parameters: {first_few(matched)}"
    return f"{text} matches only parameters of earlier groups: {first_few(matched)}"
