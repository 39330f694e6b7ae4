"""Which optimizers are correct under ZeRO, which passes each rank a shard as 1-D tensors.

An elementwise optimizer computes the same on shards. One that depends on shapes, or on all
parameters together, would silently compute something else: it is refused.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from harness.config.deepspeed_rules import UnsupportedSetting, check_optimizer_covers_all
from harness.config.engine_sections import OptimizerConfig
from harness.errors import ConfigError
from harness.optim.build import build_optimizer
from harness.optim.registry import OPTIMIZERS, optimizer_class
from harness.optim.sharded.optimizer import ShardedOptimizer
from harness.zero.engine_state import DEFAULT_CLIPPING

log = logging.getLogger(__name__)

MUON_OF_DEEPSPEED = "muon-deepspeed"

UNSUPPORTED: dict[type[Optimizer], str] = {
    torch.optim.LBFGS: "it computes the loss several times a step, but DeepSpeed only once",
    torch.optim.SparseAdam: "it needs sparse gradients, which ZeRO cannot reduce",
}
"""Optimizers that no DeepSpeed engine can step."""


def check_zero(config: OptimizerConfig, deepspeed: Mapping[str, Any]) -> None:
    """Raises ConfigError if the optimizer is not correct under DeepSpeed's config, and warns if
    that is unknown."""
    zero = deepspeed.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    kind = optimizer_class(config.name)
    for unsupported, reason in UNSUPPORTED.items():
        if issubclass(kind, unsupported):
            raise ConfigError(
                f"optimizer {config.name!r} is not supported: {reason}; use another optimizer"
            )
    if not stage and deepspeed.get("fp16", {}).get("enabled"):
        raise ConfigError(
            "fp16 at ZeRO stage 0: DeepSpeed divides the gradients by a loss scale that it never "
            "applied (DeepSpeed #8393), so that small ones count for nothing, and none is clipped: "
            "use stage 1, which needs no second rank, or bf16"
        )
    if config.name == MUON_OF_DEEPSPEED and stage == 3 and zero.get("reduce_scatter", True):
        raise ConfigError(
            f"optimizer {config.name!r} needs complete gradients at ZeRO stage 3: set "
            "zero_optimization.reduce_scatter = false, or use 'muon'"
        )
    check_clipping(config, stage, deepspeed.get("gradient_clipping", DEFAULT_CLIPPING))
    if issubclass(kind, ShardedOptimizer):
        _check_sharded(config.name, deepspeed)
    spec = OPTIMIZERS.get(config.name)
    if stage and spec is not None and spec.wrong_when_sharded:
        raise ConfigError(
            f"optimizer {config.name!r} is not correct at ZeRO stage {stage}: "
            f"{spec.wrong_when_sharded}; use stage 0"
        )
    is_half = any(deepspeed.get(dtype, {}).get("enabled") for dtype in ("bf16", "fp16"))
    if (stage or is_half) and spec is not None and spec.needs_model_parameters:
        raise ConfigError(
            f"optimizer {config.name!r}: {spec.needs_model_parameters}, but with ZeRO or a 16-bit "
            "dtype it only sees the master weights: use ZeRO stage 0 in fp32"
        )
    is_known = spec is not None or issubclass(kind, ShardedOptimizer)
    if stage and not is_known and not _is_elementwise_torch(kind):
        log.warning(
            "optimizer %r is not known to be elementwise: at ZeRO stage %d it receives 1-D "
            "tensors, this rank's shard of the parameters",
            config.name,
            stage,
        )


def check_clipping(config: OptimizerConfig, stage: int, norm: float) -> None:
    """Raises ConfigError if the optimizer is not correct when gradients are clipped to `norm`."""
    if config.name == MUON_OF_DEEPSPEED and stage and norm:
        raise ConfigError(
            f"optimizer {config.name!r}: at ZeRO stage {stage} DeepSpeed clips its updates instead "
            f"of the gradients (to {norm:g}): set gradient_clipping = 0 in DeepSpeed's config, or "
            "use 'muon', or stage 0"
        )


def _check_sharded(name: str, deepspeed: Mapping[str, Any]) -> None:
    try:
        check_optimizer_covers_all(deepspeed)
    except UnsupportedSetting as error:
        raise ConfigError(f"optimizer {name!r}: {error}") from None


def _is_elementwise_torch(kind: type[Optimizer]) -> bool:
    """Whether a class is one of torch's elementwise optimizers."""
    is_torch = kind.__module__.startswith("torch.optim.")
    return is_torch and kind.__name__ not in ("Adafactor", "LBFGS", "Muon")


def can_regroup(kind: type[Optimizer]) -> bool:
    """Whether parameters can move to other groups with their state, as in torch's elementwise
    optimizers. Others may keep a part of it in their groups."""
    return _is_elementwise_torch(kind)


def is_elementwise(config: OptimizerConfig, device: torch.device) -> bool:
    """Whether the optimizer keeps the same state for a matrix as for a vector of its elements.

    If not (Adafactor keeps means of rows and columns), the state cannot be resharded. Determined by
    stepping a matrix and a vector, except for those that know it of themselves.
    """
    kind = optimizer_class(config.name)
    if issubclass(kind, ShardedOptimizer):
        return kind.IS_ELEMENTWISE
    config = config.model_copy(update={"groups": [], "no_decay": False})
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
