"""The block that a model repeats: what is offloaded, compiled or placed as one piece."""

from torch import nn

from harness.zero.parameters import full_numel


def repeated_class(model: nn.Module) -> type[nn.Module] | None:
    """The class of a model's repeated block: that of the `nn.ModuleList` (or `nn.Sequential`) with
    the most parameters among those of two modules or more, all of one class."""
    best, most = None, 0
    for module in model.modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < 2:
            continue
        classes = {type(child) for child in module}
        size = sum(full_numel(parameter) for parameter in module.parameters())
        if len(classes) == 1 and size > most:
            best, most = classes.pop(), size
    return best
