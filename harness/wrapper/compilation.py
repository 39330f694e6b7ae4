"""torch.compile, for a complete model or for each of its repeated blocks."""

from torch import nn

from harness.errors import ConfigError
from harness.wrapper.blocks import repeated_class


def compile_model(model: nn.Module, *, blocks: bool) -> None:
    """Compiles a model in place or, with `blocks`, each of its repeated blocks.

    State-dict names do not change. Compilation runs at the first call. Raises ConfigError if there
    are no repeated blocks.
    """
    if not blocks:
        model.compile()
        return
    repeated = repeated_class(model)
    if repeated is None:
        raise ConfigError(f"compile: {type(model).__name__} has no nn.ModuleList of one class")
    for module in model.modules():
        if type(module) is repeated:
            module.compile()
