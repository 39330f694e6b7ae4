"""The block that a model repeats: the unit of offloading, compilation and placement."""

from torch import nn

from harness.zero.parameters import full_numel


def repeated_class(model: nn.Module) -> type[nn.Module] | None:
    """The class of a model's repeated block: among the `nn.ModuleList`s and `nn.Sequential`s of two
    or more modules of a single class, that of the one with the most parameters; None if none."""
    best, most = None, 0
    for module in model.modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < 2:
            continue
        classes = {type(child) for child in module}
        size = sum(full_numel(parameter) for parameter in module.parameters())
        if len(classes) == 1 and size > most:
            best, most = classes.pop(), size
    return best
