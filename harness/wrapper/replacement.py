"""Replaces modules of one class with another, in an existing model or while models are built.

replace(model, nn.Linear, BitLinear, exclude="head")
with inject(nn.Linear, BitLinear):
    model = Model()
"""

import re
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from harness.errors import ConfigError
from harness.wrapper.encoder_fast_path import disable_encoder_fast_path
from harness.zero.parameters import full_shape

Factory = type[nn.Module] | Callable[[Any], nn.Module]


@dataclass(frozen=True)
class ModuleChange:
    """A changed module, for logs and callers: "blocks.0.up: Linear -> BitLinear"."""

    name: str
    """Its path in the model; the first one if it has several."""
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.name or 'the model'}: {self.before} -> {self.after}"


def replace(
    model: nn.Module,
    what: type[nn.Module],
    by: Factory,
    *,
    include: str = ".*",
    exclude: str = "",
) -> list[ModuleChange]:
    """Replaces, in place, the modules of class `what` whose names match. Returns the changes.

    - `what`: exactly this class; modules of its subclasses are not replaced.
    - `by`: a subclass of `what`, which becomes the modules' class: nothing else about them changes,
      so it must not define `__init__`. Or a function, or another class, that builds a new module
      from the old one, which the new module may contain.
    - `include`, `exclude`: regular expressions for full names. A module with several names is
      included or excluded by any of them, and is replaced under all of them.

    A new module takes over the parameters and buffers of the old one, the same tensors under the
    same names, so ties, dtype, device and `requires_grad` are preserved. It also takes over hooks,
    with their handles, and the training mode. Its other tensors are moved to the old module's
    device and floating-point dtype.

    Raises ConfigError, with the model unchanged, if nothing matches, or if a new module has no
    parameter or buffer for a tensor of the old one.
    """
    matches = _matches(model, what, include, exclude)
    if not matches:
        names = ", ".join(n for n, m in model.named_modules() if type(m) is what and n)
        raise ConfigError(
            f"replace: include = {include!r}, exclude = {exclude!r} match no {what.__name__} of "
            f"{type(model).__name__}; it has: {names[:500] or 'none'}"
        )
    if isinstance(by, type) and issubclass(by, what):
        _check_subclass(what, by)
        new_class = dict.fromkeys(matches, by.__name__)
        for module in matches:
            module.__class__ = by
    else:
        _check_not_nested(matches)
        new_modules = {old: _new_module(names[0], old, by) for old, names in matches.items()}
        new_class = {old: type(new).__name__ for old, new in new_modules.items()}
        for old, new in new_modules.items():
            _take_over(old, new)
            for name in matches[old]:
                parent, _, child = name.rpartition(".")
                model.get_submodule(parent)._modules[child] = new
    disable_encoder_fast_path(model)
    return [ModuleChange(names[0], what.__name__, new_class[old]) for old, names in matches.items()]


@contextmanager
def inject(what: type[nn.Module], by: type[nn.Module]) -> Iterator[None]:
    """Inside the context, constructing a `what` returns a `by`, however `what` was imported.

    `by` is a subclass of `what` and is constructed with the same arguments. Subclasses of `what`
    are not affected, nor are the submodules that a `by` builds for itself. On exit, also after an
    exception, `what` is restored; modules already built keep their class. Not thread-safe. Raises
    ConfigError if `by` is not a subclass.
    """
    if not issubclass(by, what) or by is what:
        raise ConfigError(f"inject: {by.__name__} is not a subclass of {what.__name__}")
    own_init = vars(what).get("__init__")
    plain_init: Any = what.__init__
    is_inside = False

    def build(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        nonlocal is_inside
        if type(self) is not what or is_inside:
            plain_init(self, *args, **kwargs)
            return
        is_inside = True
        try:
            self.__class__ = by
            by.__init__(self, *args, **kwargs)
        finally:
            is_inside = False

    what.__init__ = build
    try:
        yield
    finally:
        if own_init is None:
            del what.__init__
        else:
            what.__init__ = own_init


def _matches(
    model: nn.Module, what: type[nn.Module], include: str, exclude: str
) -> dict[nn.Module, list[str]]:
    """The modules that match, each with all its names."""
    names_of = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is what:
            names_of[module].append(name)
    return {
        module: names
        for module, names in names_of.items()
        if any(re.fullmatch(include, name) for name in names)
        and not (exclude and any(re.fullmatch(exclude, name) for name in names))
    }


def _check_subclass(what: type[nn.Module], by: type[nn.Module]) -> None:
    """Raises ConfigError unless modules of `what` can become `by` by changing their class."""
    if by is what or by.__init__ is not what.__init__:
        fault = (
            "is the class to be replaced"
            if by is what
            else "defines __init__, which would not be called"
        )
        raise ConfigError(
            f"replace: {by.__name__} {fault}: pass a subclass of {what.__name__} without __init__, "
            "or a function that builds a new module from the old one"
        )


def _check_not_nested(matches: dict[nn.Module, list[str]]) -> None:
    """Raises ConfigError if a module to be replaced contains another one or is the model."""
    for outer, names in matches.items():
        if "" in names:
            raise ConfigError(
                "replace: the model itself cannot be replaced by a function: call the function"
            )
        for inner in outer.modules():
            if inner is not outer and inner in matches:
                raise ConfigError(
                    f"replace: {matches[inner][0]!r} is inside {names[0]!r}, and both match: "
                    "select one with include or exclude"
                )


def _new_module(name: str, old: nn.Module, by: Factory) -> nn.Module:
    """The function's new module for `old`. Raises ConfigError if it lacks one of its tensors."""
    new = by(old)
    if not isinstance(new, nn.Module):
        raise ConfigError(
            f"replace: {name}: the function returned a {type(new).__name__}, expected an nn.Module"
        )
    new_tensors = _tensors(new)
    already_in = set(map(id, new_tensors.values()))
    for path, tensor in _tensors(old).items():
        if id(tensor) in already_in:
            continue
        shape = _shape(new_tensors[path]) if path in new_tensors else "none"
        if shape != _shape(tensor):
            raise ConfigError(
                f"replace: {name}: {type(new).__name__} has no parameter or buffer like {path!r} "
                f"of {type(old).__name__}: expected shape {_shape(tensor)}, found {shape}"
            )
    return new


def _take_over(old: nn.Module, new: nn.Module) -> None:
    """Transfers the tensors, training mode and hooks of the old module to the new one."""
    _take_over_tensors(old, new)
    old_modules = set(old.modules())
    for module in new.modules():
        if module not in old_modules:
            module.training = old.training
    if old not in new.modules():  # else the new module calls it, with its hooks
        _take_over_hooks(old, new)


def _take_over_tensors(old: nn.Module, new: nn.Module) -> None:
    old_tensors = _tensors(old)
    already_in = set(map(id, _tensors(new).values()))
    for path, tensor in old_tensors.items():
        if id(tensor) not in already_in:
            parent, _, key = path.rpartition(".")
            owner: Any = new.get_submodule(parent)
            (owner._parameters if key in owner._parameters else owner._buffers)[key] = tensor
    taken_over = set(map(id, old_tensors.values()))
    like = next((tensor for tensor in old_tensors.values() if tensor.is_floating_point()), None)
    for tensor in _tensors(new).values():
        if id(tensor) not in taken_over and like is not None:
            dtype = like.dtype if tensor.is_floating_point() else tensor.dtype
            tensor.data = tensor.data.to(like.device, dtype)


def _take_over_hooks(old: nn.Module, new: nn.Module) -> None:
    for key, hooks in vars(old).items():
        if "_hooks" in key and isinstance(hooks, dict):  # the same dict: handles stay valid
            for hook in hooks.values():
                if getattr(hook, "with_module", False):  # load_state_dict's hooks refer to a module
                    hook.module = weakref.ref(new)
            hooks.update(vars(new).get(key) or {})
            new.__dict__[key] = hooks


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under all their names."""
    parameters: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    return parameters | dict(module.named_buffers(remove_duplicate=False))


def _shape(tensor: Tensor) -> list[int]:
    """The full shape, also of a parameter that ZeRO stage 3 has sharded."""
    return list(full_shape(tensor))
