"""Optimizers by name: a registered one, or any class by its import path."""

import importlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from harness.config import OptimizerConfig
from harness.errors import ConfigError, did_you_mean

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"adamw": torch.optim.AdamW}


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> Optimizer:
    """The optimizer that the config names, over the trainable parameters.

    Raises ConfigError for an unknown name and for arguments that the optimizer does not take.
    """
    make = OPTIMIZERS.get(config.name) or _imported(config.name)
    check_arguments(f"optimizer {config.name!r}", make, config.args)
    try:
        return make(parameters, lr=config.lr, **config.args)
    except Exception as error:  # what an optimizer makes of wrong arguments
        raise ConfigError(f"optimizer {config.name!r}: {error}") from error


def _imported(path: str) -> Callable[..., Optimizer]:
    module, _, name = path.partition(":")
    if not (module and name):
        raise ConfigError(
            f"optimizer {path!r} is unknown{did_you_mean(path, OPTIMIZERS)}; known: "
            f"{', '.join(OPTIMIZERS)}, or an import path, like 'torch.optim:SGD'"
        )
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"optimizer {path!r}: {error}") from None
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise ConfigError(f"optimizer {path!r} is no torch.optim.Optimizer")
    return found


def is_elementwise(config: OptimizerConfig, device: torch.device) -> bool:
    """Whether the optimizer keeps the same state for a matrix as for its elements in one row.

    One step of both tells. Where it is not so (Adafactor keeps means of rows and columns, Muon
    takes no rows), the state can neither be cut nor joined.
    """
    states = []
    for shape in ((2, 3), (6,)):
        parameter = nn.Parameter(torch.ones(shape, device=device))
        parameter.grad = torch.ones_like(parameter)
        try:
            optimizer = build_optimizer([parameter], config)
        except ConfigError:
            return False
        optimizer.step()
        state = optimizer.state[parameter]
        states.append({key: v.numel() for key, v in state.items() if torch.is_tensor(v)})
    return states[0] == states[1]


def check_arguments(what: str, function: Callable[..., Any], args: dict[str, Any]) -> None:
    """Raises ConfigError if `function` has no parameter of an argument's name."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    known = [name for name in list(parameters)[1:] if name != "lr"]
    for key in args:
        if key not in known:
            hint = did_you_mean(key, known)
            raise ConfigError(f"{what}: unknown key {key!r}{hint}; known: {', '.join(known)}")
