"""What ZeRO does to an optimizer: it hands it 1-D tensors, each rank its own shard.

An elementwise optimizer computes the same with them. One that looks at shapes, or at all parameters
together, would silently compute something else: it is refused.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from harness.config.deepspeed_rules import Refused, apollo_steps_all_parameters
from harness.config.engine_sections import OptimizerConfig
from harness.errors import ConfigError
from harness.optim.apollo.optimizer import Apollo
from harness.optim.build import build_optimizer
from harness.optim.registry import OPTIMIZERS, optimizer_class

log = logging.getLogger(__name__)


def check_zero(config: OptimizerConfig, deepspeed: Mapping[str, Any]) -> None:
    """Raises ConfigError if the optimizer is wrong under DeepSpeed's config, and warns if it is
    unknown whether it is."""
    zero = deepspeed.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    kind = optimizer_class(config.name)
    if config.name == "muon" and stage == 3 and zero.get("reduce_scatter", True):
        raise ConfigError(
            f"optimizer {config.name!r}: at ZeRO stage 3 it needs complete gradients: set "
            "zero_optimization.reduce_scatter to false"
        )
    if issubclass(kind, Apollo):
        _check_apollo(config.name, stage, deepspeed)
    spec = OPTIMIZERS.get(config.name)
    if stage and spec is not None and spec.wrong_when_sharded:
        raise ConfigError(
            f"optimizer {config.name!r} is wrong at ZeRO stage {stage}: "
            f"{spec.wrong_when_sharded}; use stage 0"
        )
    is_half = any(deepspeed.get(dtype, {}).get("enabled") for dtype in ("bf16", "fp16"))
    if (stage or is_half) and spec is not None and spec.needs_model_parameters:
        raise ConfigError(
            f"optimizer {config.name!r}: {spec.needs_model_parameters}, and with ZeRO or 16 bits "
            "the model computes with copies of those: use ZeRO stage 0 in fp32"
        )
    if stage and spec is None and not _is_elementwise_torch(kind):
        log.warning(
            "optimizer %r is not known to be elementwise: at ZeRO stage %d it gets 1-D tensors, "
            "this rank's shard of all parameters",
            config.name,
            stage,
        )


def _check_apollo(name: str, stage: int, deepspeed: Mapping[str, Any]) -> None:
    try:
        apollo_steps_all_parameters(deepspeed)
    except Refused as error:
        raise ConfigError(f"optimizer {name!r}: {error}") from None
    if not stage and deepspeed.get("fp16", {}).get("enabled"):
        raise ConfigError(
            f"optimizer {name!r}: fp16 at ZeRO stage 0 divides the gradients by a loss scale that "
            "was never applied (DeepSpeed #8393): use stage 1, or bf16"
        )


def _is_elementwise_torch(kind: type[Optimizer]) -> bool:
    """Whether a class is one of torch's elementwise optimizers."""
    is_torch = kind.__module__.startswith("torch.optim.")
    return is_torch and kind.__name__ not in ("Adafactor", "LBFGS", "Muon")


def is_elementwise(config: OptimizerConfig, device: torch.device) -> bool:
    """Whether the optimizer keeps the same state for a matrix as for its elements in one row.

    Otherwise (Adafactor keeps means of rows and columns) the state can be neither split nor joined.
    Steps a matrix and a vector to find out; not APOLLO, to which so small a matrix is dense.
    """
    if issubclass(optimizer_class(config.name), Apollo):
        return False
    states = []
    for shape in ((2, 3), (6,)):
        parameter = nn.Parameter(torch.ones(shape, device=device))
        parameter.grad = torch.ones_like(parameter)
        try:
            optimizer = build_optimizer(nn.ParameterList([parameter]), config)
        except ConfigError:
            return False
        getattr(optimizer, "train", lambda: None)()
        optimizer.step()
        state = optimizer.state[parameter]
        states.append({key: v.numel() for key, v in state.items() if torch.is_tensor(v)})
    return states[0] == states[1]
