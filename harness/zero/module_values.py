"""The tensors that modules take, return and leave behind, which ZeRO 3 fetches and releases by.

DeepSpeed puts a function into the graph before every tensor that a module returns, whose backward
gathers the module's weights, and one after every tensor that it takes, whose backward releases
them (zero/parameter_offload.py). Here these functions reach the tensors wherever they are, and what
the user's code sees stays as it is without them: lists and dicts are the same objects, and a tensor
that a module changes in place has changed for its caller, too.
"""

from collections import UserDict
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

OnTensor = Callable[[Tensor], Tensor]

ORIGINAL = "ds_original"
"""The attribute of a tensor that a module takes: its caller's own one, None if that is itself, and
its version."""
WATCHED = "ds_watched_by"
"""The attribute of a tensor that modules keep: their numbers."""
LONG = 1000
"""A longer list has no tensors, unless the first element is one: to look at all takes too long."""

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""Attributes that torch itself keeps in a module."""
_PLAIN = {bool, int, float, str, bytes, type(None), type, torch.dtype, torch.device, torch.Size}


def transforms_are_active() -> bool:
    """Whether this runs inside of a function of torch.func: all weights are gathered already."""
    return torch._C._are_functorch_transforms_active()


def attach(function: Any, value: Any, **_: Any) -> Any:
    """In place of DeepSpeed's `apply_to_tensors_only`: attaches one of its functions, whose `apply`
    is `function`, to the tensors in what a module returns, or in its positional arguments."""
    if transforms_are_active():
        return value
    kind = function.__self__
    is_taken = kind.__name__.startswith("Post")
    return _Walk(partial(_take if is_taken else _leave, kind)).through(value)


def follow_forward(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """A forward hook, after all others: a backward may also begin at a tensor which forward has
    left in an attribute, like `self.loss`, or in an argument, or in an output of any class.

    Returns the output.
    """
    if transforms_are_active() or not torch.is_grad_enabled():
        return output
    leave = partial(_leave, module.pre_bwd_fn)
    walk = _Walk(partial(_watch, module))
    for value in [value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE]:
        walk.through(value)
    for value in args:
        if isinstance(value, Tensor):
            _leave_argument(leave, value)
    for value in (*args, *kwargs.values()):
        if not isinstance(value, Tensor):
            walk = _Walk(partial(_leave_inside, leave))
            walk.through(value)
            walk.through_attributes(value)
    walk = _Walk(leave)
    output = walk.through(output)
    walk.through_attributes(output)
    return output


def _take(kind: Any, value: Any) -> Tensor:
    """`value`, for a module: its gradient tells that the module's backward is over."""
    if not torch.is_grad_enabled() or value.is_inference():
        return value
    if not value.requires_grad:
        setattr(value, ORIGINAL, (None, value._version))
        return value
    taken = _attached(kind, value)
    setattr(taken, ORIGINAL, (value, value._version))
    return taken


def _leave(kind: Any, value: Any) -> Tensor:
    """`value`, of a module: its gradient begins the module's backward."""
    if value.grad_fn is None or isinstance(value.grad_fn, kind._backward_cls):
        return value
    return _attached(kind, value) if torch.is_grad_enabled() else value


def _watch(module: Any, value: Tensor) -> Tensor:
    """`value`, which a module keeps: its gradient begins the module's backward, and it stays the
    same tensor, whose gradient the user may ask for."""
    watched = vars(value).setdefault(WATCHED, set())
    if value.grad_fn is None or module.ds_id in watched:
        return value
    watched.add(module.ds_id)
    context = SimpleNamespace()
    module.pre_bwd_fn.setup_context(context, (value,), value)
    value.register_hook(lambda _: context.pre_backward_function(module))
    return value


def _leave_argument(leave: OnTensor, value: Tensor) -> Tensor:
    """If a module has changed what it took in place, its caller's tensor has that gradient, too."""
    if not hasattr(value, ORIGINAL):
        return value
    original, version = vars(value).pop(ORIGINAL)
    if value.grad_fn is None or version == value._version:
        return value
    changed = leave(value)
    _follow(value if original is None else original, changed)
    return changed


def _leave_inside(leave: OnTensor, value: Tensor) -> Tensor:
    """For a tensor in a list, dict or record that a module took: it may be a new one."""
    return _leave_argument(leave, value) if hasattr(value, ORIGINAL) else leave(value)


def _attached(kind: Any, value: Any) -> Any:
    attached = kind.apply(value)
    if hasattr(value, "ds_id"):
        attached.ds_param_alias = value  # DeepSpeed registers a parameter that a module returns
    return attached


class _Follow(torch.autograd.Function):
    """Gives a tensor the history of another one, which has the same memory."""

    @staticmethod
    def forward(ctx: Any, original: Tensor, changed: Tensor) -> Tensor:  # type: ignore[override]
        ctx.mark_dirty(original)
        return original

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return None, gradient


def _follow(original: Tensor, changed: Tensor) -> None:
    with torch.autograd.grad_mode._unsafe_preserve_version_counter(original):
        _Follow.apply(original, changed)


class _Walk:
    """Applies `function` to the tensors in a value, which may contain itself.

    In lists, dicts and records in place, where leaves stay as they are: they may be parameters.
    """

    def __init__(self, function: OnTensor):
        self._function = function
        self._seen: set[int] = set()

    def through(self, value: Any) -> Any:
        """The value, or a new one if it is a tensor or a tuple that has changed."""
        if isinstance(value, Tensor):
            return self._function(value)
        if type(value) in _PLAIN or id(value) in self._seen:
            return value
        match value:
            case tuple():
                return self._through_tuple(value)
            case list():
                self._through_items(value, enumerate(value))
            case dict():
                self._through_items(value, value.items())
            case SimpleNamespace() | UserDict():
                self.through_attributes(value)
            case _ if is_dataclass(value) and not isinstance(value, type):
                self._seen.add(id(value))
                for field in fields(value):
                    element = getattr(value, field.name, None)
                    if (touched := self._inside(element)) is not element:
                        object.__setattr__(value, field.name, touched)
        return value

    def through_attributes(self, value: Any) -> None:
        """Of an object of any class."""
        if id(value) in self._seen or isinstance(value, Tensor | nn.Module | type):
            return
        self._seen.add(id(value))
        attributes = getattr(value, "__dict__", {})
        self._through_items(attributes, list(attributes.items()))

    def _through_tuple(self, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if _is_long(value):
            return value
        elements = [self.through(element) for element in value]
        if all(new is old for new, old in zip(elements, value, strict=True)):
            return value
        return getattr(type(value), "_make", type(value))(elements)  # of a named one

    def _through_items(self, container: Any, items: Iterable[tuple[Any, Any]]) -> None:
        self._seen.add(id(container))
        if _is_long(container):
            return
        for key, element in items:
            if (touched := self._inside(element)) is not element:
                container[key] = touched

    def _inside(self, element: Any) -> Any:
        is_leaf = isinstance(element, Tensor) and element.grad_fn is None
        return element if is_leaf else self.through(element)


def _is_long(container: Any) -> bool:
    if len(container) <= LONG:
        return False
    first = next(iter(container.values() if isinstance(container, dict) else container))
    return not isinstance(first, Tensor)
