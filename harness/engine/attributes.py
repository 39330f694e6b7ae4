"""What a model's forward leaves in attributes of its submodules, as `loss` and `stats`."""

from collections.abc import Callable
from typing import Any

from torch import nn

Choice = Callable[[nn.Module], bool]


def gather(model: nn.Module, name: str, kind: type = object) -> dict[str, Any]:
    """Removes attribute `name` from every submodule that has it; `{module path: value}`.

    Values that are not of type `kind` are left alone. Models may set `loss` and `stats` on their
    submodules for the default feeder.
    """
    values = {}
    for path, module in model.named_modules():
        if isinstance(vars(module).get(name), kind) and name in vars(module):
            values[path] = vars(module).pop(name)
    return values


def dispatch(model: nn.Module, name: str, value: Any, where: Choice | None = None) -> int:
    """Sets attribute `name` on every submodule that has it (or for which `where` is true).

    Returns the number of submodules that were set.
    """
    chosen = [m for m in model.modules() if (where(m) if where else hasattr(m, name))]
    for module in chosen:
        setattr(module, name, value)
    return len(chosen)
