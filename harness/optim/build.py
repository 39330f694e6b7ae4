"""Optimizers by name, or by import path, and what ZeRO does not let them do.

ZeRO hands an optimizer vectors, each rank its own shard. That is all the same to an optimizer that
treats every element alone, and a silent change of the method to one that looks at shapes or at all
parameters together: such a one is refused.
"""

import importlib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from harness.config.engine_sections import OptimizerConfig
from harness.errors import ConfigError, did_you_mean
from harness.optim.apollo.groups import apollo_param_groups
from harness.optim.apollo.optimizer import Apollo

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OptimizerSpec:
    """What is known of an optimizer that has a name here."""

    path: str
    """Its import path."""
    wrong_when_sharded: str = ""
    """Why it is wrong on the shards of ZeRO stages 1 to 3; empty if it is not."""
    needs_model_parameters: str = ""
    """Why it has to step the model's own parameters, as it does in fp32 at stage 0 alone."""
    make: Callable[..., Optimizer] | None = None
    """What makes it of a model, if its constructor does not of the parameters."""


def _muon(
    model: nn.Module,
    *,
    lr: float,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    adam_lr: float | None = None,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> Optimizer:
    """Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.

    DeepSpeed's, whose ZeRO wrappers find the matrices by a mark on them; AdamW for the rest.
    """
    module = importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    parts: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for group in apollo_param_groups(model, rank=1, stacked="$^"):
        for parameter in group["params"]:
            parameter.use_muon = bool(group["rank"]) and parameter.dim() == 2
            parts[parameter.use_muon].append(parameter)
    settings: dict[bool, dict[str, Any]] = {
        True: {"lr": lr, "momentum": momentum},
        False: {"lr": lr if adam_lr is None else adam_lr, "betas": tuple(betas), "eps": eps},
    }
    groups = [
        {"params": parameters, "use_muon": is_muon, "weight_decay": weight_decay}
        | settings[is_muon]
        for is_muon, parameters in parts.items()
        if parameters
    ]
    return module.MuonWithAuxAdam(groups)


OPTIMIZERS = {
    "adamw": OptimizerSpec("torch.optim:AdamW"),
    "apollo": OptimizerSpec("harness.optim.apollo:Apollo"),
    "apollo-mini": OptimizerSpec("harness.optim.apollo:ApolloMini"),
    "muon": OptimizerSpec(
        "deepspeed.runtime.zero.muon.muon_optimizer:MuonWithAuxAdam",
        make=_muon,
    ),
    "adafactor": OptimizerSpec(
        "torch.optim:Adafactor",
        wrong_when_sharded="it keeps means of a matrix's rows and columns, and gets vectors",
    ),
    "prodigy": OptimizerSpec(
        "prodigyopt:Prodigy",
        wrong_when_sharded="it estimates one step size from all parameters, and gets only this "
        "rank's",
    ),
    "schedulefree": OptimizerSpec(
        "schedulefree:AdamWScheduleFree",
        needs_model_parameters="for evaluation it puts averages in the place of the weights",
    ),
    "adam8bit": OptimizerSpec("bitsandbytes.optim:Adam8bit"),
    "adamw8bit": OptimizerSpec("bitsandbytes.optim:AdamW8bit"),
    "lion8bit": OptimizerSpec("bitsandbytes.optim:Lion8bit"),
}


POLICY = ("low_rank", "dense", "stacked")
"""The arguments of `apollo_param_groups` that a config may set."""


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The optimizer that the config names, over the trainable parameters of a model.

    APOLLO also takes the arguments of `apollo_param_groups`. Raises ConfigError for an unknown
    name, and for arguments that the optimizer does not take.
    """
    kind: Any = _imported(config.name)
    args: dict[str, Any] = dict(config.args)
    is_apollo = issubclass(kind, Apollo)
    known = OPTIMIZERS.get(config.name)
    make: Any = (known and known.make) or (Apollo if is_apollo else kind)
    check_arguments(f"optimizer {config.name!r}", make, args, POLICY if is_apollo else ())
    try:
        if known is not None and known.make is not None:
            return known.make(model, lr=config.lr, **args)
        if is_apollo:
            policy = {key: args.pop(key) for key in POLICY if key in args}
            rank = args.pop("rank", kind.RANK)
            return kind(apollo_param_groups(model, rank=rank, **policy), lr=config.lr, **args)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return kind(trainable, lr=config.lr, **args)
    except Exception as error:  # what an optimizer makes of wrong arguments
        raise ConfigError(f"optimizer {config.name!r}: {error}") from error


def check_zero(config: OptimizerConfig, deepspeed: Mapping[str, Any]) -> None:
    """Raises ConfigError if the optimizer is wrong under DeepSpeed's config.

    Of one by import path nobody knows: it is warned of.
    """
    zero = deepspeed.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    kind = _imported(config.name)
    if config.name == "muon" and stage == 3 and zero.get("reduce_scatter", True):
        raise ConfigError(
            f"optimizer {config.name!r}: at ZeRO stage 3 it needs whole gradients: set "
            "zero_optimization.reduce_scatter to false"
        )
    if issubclass(kind, Apollo):
        _check_apollo(config.name, stage, zero, deepspeed)
    named = OPTIMIZERS.get(config.name)
    if stage and named is not None and named.wrong_when_sharded:
        raise ConfigError(
            f"optimizer {config.name!r} is wrong at ZeRO stage {stage}: "
            f"{named.wrong_when_sharded}; use stage 0"
        )
    is_half = any(deepspeed.get(dtype, {}).get("enabled") for dtype in ("bf16", "fp16"))
    if (stage or is_half) and named is not None and named.needs_model_parameters:
        raise ConfigError(
            f"optimizer {config.name!r}: {named.needs_model_parameters}, and here the model "
            "computes with copies of those: use ZeRO stage 0 in fp32"
        )
    if stage and named is None and not _treats_elements_alone(kind):
        log.warning(
            "optimizer %r is not known to treat every element alone: at ZeRO stage %d it gets "
            "vectors, this rank's part of all parameters",
            config.name,
            stage,
        )


def _treats_elements_alone(kind: type[Optimizer]) -> bool:
    """Whether an optimizer by import path is one of torch's, but for those that look at shapes."""
    of_torch = kind.__module__.startswith("torch.optim.")
    return of_torch and kind.__name__ not in ("Adafactor", "LBFGS", "Muon")


def _check_apollo(name: str, stage: int, zero: Mapping[str, Any], ds: Mapping[str, Any]) -> None:
    offload = zero.get("offload_optimizer") or {}
    reasons = {
        "zero_optimization.elastic_checkpoint can only save state of the parameters' size: switch "
        "it off": bool(zero.get("elastic_checkpoint")),
        "on NVMe there is room only for state of the parameters' size: set "
        "zero_optimization.offload_optimizer.device to 'cpu'": offload.get("device") == "nvme",
        "DeepSpeed steps a part of the parameters with an AdamW of its own: set "
        "zero_optimization.offload_optimizer.ratio to 1.0": offload.get("ratio", 1.0) != 1.0,
        "fp16 at ZeRO stage 0 divides the gradients by a loss scale that was never applied "
        "(DeepSpeed #8393): use stage 1, or bf16": not stage
        and bool(ds.get("fp16", {}).get("enabled")),
    }
    for reason, applies in reasons.items():
        if applies:
            raise ConfigError(f"optimizer {name!r}: {reason}")


def _imported(name: str) -> type[Optimizer]:
    """The class of a registered name, or of an import path. Raises ConfigError."""
    known = OPTIMIZERS.get(name) or OptimizerSpec(name)
    module, _, attribute = known.path.partition(":")
    if not (module and attribute):
        raise ConfigError(
            f"optimizer {name!r} is unknown{did_you_mean(name, OPTIMIZERS)}; known: "
            f"{', '.join(OPTIMIZERS)}, or an import path, like 'torch.optim:SGD'"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"optimizer {name!r}: {error}") from None
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise ConfigError(f"optimizer {name!r} is no torch.optim.Optimizer")
    return found


def is_elementwise(config: OptimizerConfig, device: torch.device) -> bool:
    """Whether the optimizer keeps the same state for a matrix as for its elements in one row.

    One step of both tells, but for APOLLO, to which so small a matrix is dense. Where it is not so
    (Adafactor keeps means of rows and columns), the state can neither be cut nor joined.
    """
    if issubclass(_imported(config.name), Apollo):
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


def check_arguments(
    what: str, function: Callable[..., Any], args: Mapping[str, Any], also: Sequence[str] = ()
) -> None:
    """Raises ConfigError if `function` has no parameter of an argument's name, unless it is one
    of `also`."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    known = [*(name for name in list(parameters)[1:] if name != "lr"), *also]
    for key in args:
        if key not in known:
            hint = did_you_mean(key, known)
            raise ConfigError(f"{what}: unknown key {key!r}{hint}; known: {', '.join(known)}")
