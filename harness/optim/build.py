"""An optimizer from its table in the config."""

from typing import Any

from torch import nn
from torch.optim import Optimizer

from harness.config.engine_sections import OptimizerConfig
from harness.errors import ConfigError
from harness.optim.apollo.optimizer import Apollo
from harness.optim.apollo.param_groups import apollo_param_groups
from harness.optim.arguments import check_arguments
from harness.optim.registry import OPTIMIZERS, optimizer_class

PARAM_GROUP_ARGUMENTS = ("low_rank", "dense", "stacked")
"""Arguments of `apollo_param_groups` that a config may set."""


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The optimizer that the config names, for the trainable parameters of a model.

    APOLLO also takes the arguments of `apollo_param_groups`. Raises ConfigError for an unknown
    name or unknown arguments, and if the optimizer rejects them.
    """
    kind: Any = optimizer_class(config.name)
    args: dict[str, Any] = dict(config.args)
    is_apollo = issubclass(kind, Apollo)
    spec = OPTIMIZERS.get(config.name)
    constructor: Any = (spec and spec.make) or (Apollo if is_apollo else kind)
    extra = PARAM_GROUP_ARGUMENTS if is_apollo else ()
    check_arguments(f"optimizer {config.name!r}", constructor, args, extra)
    try:
        if spec is not None and spec.make is not None:
            return spec.make(model, lr=config.lr, **args)
        if is_apollo:
            selection = {key: args.pop(key) for key in extra if key in args}
            rank = args.pop("rank", kind.RANK)
            groups = apollo_param_groups(model, rank=rank, **selection)
            return kind(groups, lr=config.lr, **args)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return kind(trainable, lr=config.lr, **args)
    except Exception as error:  # an optimizer may raise any exception for wrong arguments
        raise ConfigError(f"optimizer {config.name!r}: {error}") from error
