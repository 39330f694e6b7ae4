"""Optimizers that a config can select by name or by import path."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from harness.errors import ConfigError, did_you_mean
from harness.optim.apollo.param_groups import apollo_param_groups
from harness.utils import import_path
from harness.zero import muon
from harness.zero.parameters import full_shape


@dataclass(frozen=True)
class OptimizerSpec:
    """A registered optimizer."""

    path: str
    """Import path of its class."""
    wrong_when_sharded: str = ""
    """Why its results differ on the shards of ZeRO stages 1 to 3; empty if they do not."""
    needs_model_parameters: str = ""
    """Why it must step the model's own parameters, which is possible only at stage 0 in fp32;
    empty if it need not."""
    make: Callable[..., Optimizer] | None = None
    """Builds it from a model, for optimizers whose constructor needs more than parameters."""


def _muon_of_deepspeed(
    model: nn.Module,
    *,
    lr: float,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    adam_lr: float | None = None,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> Optimizer:
    """DeepSpeed's Muon for matrices, AdamW for the other parameters: see `zero.muon`."""
    groups = apollo_param_groups(model, rank=1, stacked="$^")
    low_rank = [p for group in groups if group["rank"] for p in group["params"]]
    matrices = [p for p in low_rank if len(full_shape(p)) == 2]
    others = [p for group in groups if not group["rank"] for p in group["params"]]
    return muon.build_muon(
        matrices,
        [*(p for p in low_rank if len(full_shape(p)) != 2), *others],
        weight_decay=weight_decay,
        muon={"lr": lr, "momentum": momentum},
        adam={"lr": lr if adam_lr is None else adam_lr, "betas": tuple(betas), "eps": eps},
    )


OPTIMIZERS = {
    "adamw": OptimizerSpec("torch.optim:AdamW"),
    "apollo": OptimizerSpec("harness.optim.apollo:Apollo"),
    "apollo-mini": OptimizerSpec("harness.optim.apollo:ApolloMini"),
    "muon": OptimizerSpec("harness.optim.matrices:Muon"),
    "soap": OptimizerSpec("harness.optim.matrices:Soap"),
    "muon-deepspeed": OptimizerSpec(muon.PATH, make=_muon_of_deepspeed),
    "adafactor": OptimizerSpec(
        "torch.optim:Adafactor",
        wrong_when_sharded="it keeps row and column means of each matrix, but receives 1-D tensors",
    ),
    "prodigy": OptimizerSpec(
        "prodigyopt:Prodigy",
        wrong_when_sharded="it estimates one step size from all parameters, but receives only this "
        "rank's shard",
    ),
    "schedulefree": OptimizerSpec(
        "schedulefree:AdamWScheduleFree",
        needs_model_parameters="it replaces the model's weights with averages for evaluation",
    ),
    "adam8bit": OptimizerSpec("bitsandbytes.optim:Adam8bit"),
    "adamw8bit": OptimizerSpec("bitsandbytes.optim:AdamW8bit"),
    "lion8bit": OptimizerSpec("bitsandbytes.optim:Lion8bit"),
}


def optimizer_class(name: str) -> type[Optimizer]:
    """The class for a registered name or an import path. Raises ConfigError."""
    path = OPTIMIZERS[name].path if name in OPTIMIZERS else name
    if not all(path.partition(":")):
        raise ConfigError(
            f"optimizer {name!r} is unknown{did_you_mean(name, OPTIMIZERS)}; known: "
            f"{', '.join(OPTIMIZERS)}, or an import path such as 'torch.optim:SGD'"
        )
    try:
        kind = import_path(path)
    except ConfigError as error:
        raise ConfigError(f"optimizer {name!r}: {error}") from None
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
        raise ConfigError(f"optimizer {name!r} is not a torch.optim.Optimizer")
    return kind
