"""What a model's forward leaves in attributes of its submodules, as `loss` and `stats`."""

from collections.abc import Callable
from typing import Any

from torch import nn

Choice = Callable[[nn.Module], bool]


class Submodules:
    """The submodules of a model, by path. They are remembered, as to walk a model takes some 1.7 us
    a module, and found again when any of them has got or lost a child."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._gathered: dict[str, list[dict[str, Any]]] = {}  # where each attribute last was
        self._find()

    def __call__(self) -> list[tuple[str, nn.Module]]:
        """`named_modules` of the model as it is now."""
        changed = (list(now.items()) != before for now, before in self._parents)
        if any(self._leaves) or any(changed):
            self._find()
        return self._modules

    def _find(self) -> None:
        self._modules = list(self._model.named_modules())
        children = [module._modules for _, module in self._modules]
        self._parents = [(now, list(now.items())) for now in children if now]
        self._leaves = [now for now in children if not now]

    def gather(self, name: str, kind: type = object) -> dict[str, Any]:
        """Removes attribute `name` from every submodule that has it; `{module path: value}`.

        Values that are not of type `kind` are left alone. Models may set `loss` and `stats` on
        their submodules for the default feeder.
        """
        found = [(path, vars(m)) for path, m in self() if name in vars(m)]
        found = [(path, values) for path, values in found if isinstance(values[name], kind)]
        self._gathered[name] = [values for _, values in found]
        return {path: values.pop(name) for path, values in found}

    def drop_repeated(self) -> None:
        """Removes what is there again: activation checkpointing has run a forward once more in the
        backward. It would be taken for the next micro-batch's, and keep a graph in memory."""
        for name, found in self._gathered.items():
            for values in found:
                values.pop(name, None)
        self._gathered.clear()


def dispatch(model: nn.Module, name: str, value: Any, where: Choice | None = None) -> int:
    """Sets attribute `name` on every submodule that has it (or for which `where` is true).

    Returns the number of submodules that were set.
    """
    chosen = [m for m in model.modules() if (where(m) if where else hasattr(m, name))]
    for module in chosen:
        setattr(module, name, value)
    return len(chosen)
