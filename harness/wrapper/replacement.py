"""Modules of one class replaced by another: in a model that exists, or in models yet to be built.

replace(model, nn.Linear, BitLinear, exclude="head")
with inject(nn.Linear, BitLinear):
    model = Model()
"""

import re
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from harness.errors import ConfigError
from harness.wrapper.changes import ModuleChange
from harness.wrapper.encoder import disable_encoder_fast_path
from harness.zero.parameters import full_shape

Factory = type[nn.Module] | Callable[[Any], nn.Module]


def replace(
    model: nn.Module,
    what: type[nn.Module],
    by: Factory,
    *,
    include: str = ".*",
    exclude: str = "",
) -> list[ModuleChange]:
    """Replaces, in place, the modules of class `what` whose names match. Returns what was changed.

    - `what`: exactly this class; modules of its subclasses stay.
    - `by`: a subclass of `what`, which becomes the modules' class: nothing else about them changes,
      so it must not have an `__init__` of its own. Or a function, or another class, that makes a
      new module from the old one, and may contain it.
    - `include`, `exclude`: regular expressions for full names. A module with several names is
      included, and excluded, by any of them, and is replaced under all of them.

    A new module takes over the parameters and buffers of the old one, the same tensors under the
    same names: tied ones stay tied, and dtype, device and `requires_grad` stay. It also takes over
    hooks, with their handles, and the training mode. Its other tensors are moved to the old
    module's device and floating dtype.

    Raises ConfigError, with the model unchanged, if nothing matches, or if a new module has no
    place for a tensor of the old one.
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
        made = {old: _new_module(names[0], old, by) for old, names in matches.items()}
        new_class = {old: type(new).__name__ for old, new in made.items()}
        for old, new in made.items():
            _take_over(old, new)
            for name in matches[old]:
                parent, _, child = name.rpartition(".")
                model.get_submodule(parent)._modules[child] = new
    disable_encoder_fast_path(model)
    return [ModuleChange(names[0], what.__name__, new_class[old]) for old, names in matches.items()]


@contextmanager
def inject(what: type[nn.Module], by: type[nn.Module]) -> Iterator[None]:
    """In the block, whoever builds a `what` gets a `by`, under whatever name they imported it.

    `by` is a subclass of `what`, and is built with the same arguments. Subclasses of `what` that
    are built by their own names are not affected, nor are the parts that a `by` builds for itself.
    Afterwards, also after an exception, `what` is as before; what was built keeps its class. Not
    thread-safe. Raises ConfigError if `by` is not a subclass.
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
    """Raises ConfigError unless modules of `what` can become modules of `by` as they are."""
    if by is what or by.__init__ is not what.__init__:
        fault = "is that class itself" if by is what else "has an __init__, which would not run"
        raise ConfigError(
            f"replace: {by.__name__} {fault}: give a subclass of {what.__name__} without one, "
            "or a function that makes a new module from the old one"
        )


def _check_not_nested(matches: dict[nn.Module, list[str]]) -> None:
    """Raises ConfigError if a module to be replaced contains another one, or is the model."""
    for outer, names in matches.items():
        if "" in names:
            raise ConfigError("replace: a function cannot replace the model itself: call it on it")
        for inner in outer.modules():
            if inner is not outer and inner in matches:
                raise ConfigError(
                    f"replace: {matches[inner][0]!r} is inside {names[0]!r}, and both match: "
                    "choose one by include or exclude"
                )


def _new_module(name: str, old: nn.Module, by: Factory) -> nn.Module:
    """What the function makes of a module. Raises ConfigError if a tensor has no place in it."""
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
        found = _shape(new_tensors[path]) if path in new_tensors else "none"
        if found != _shape(tensor):
            raise ConfigError(
                f"replace: {name}: {type(new).__name__} has no place for {path!r} of "
                f"{type(old).__name__}: expected {_shape(tensor)}, found {found}"
            )
    return new


def _take_over(old: nn.Module, new: nn.Module) -> None:
    """Gives a new module the tensors, the training mode and the hooks of the old one."""
    _take_over_tensors(old, new)
    old_parts = set(old.modules())
    for module in new.modules():
        if module not in old_parts:
            module.training = old.training
    if old not in new.modules():  # else it is called as a part, with its hooks
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
                if getattr(hook, "with_module", False):  # load_state_dict's refer to their module
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
