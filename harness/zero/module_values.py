"""The tensors that modules take, return and leave behind, which ZeRO 3 fetches and releases by.

DeepSpeed puts a function into the graph before every tensor that a module returns, whose backward
gathers the module's weights, and one after every tensor that it takes, whose backward releases
them (zero/parameter_offload.py). Here these functions reach the tensors wherever they are, and what
the user's code sees stays as it is without them: lists and dicts are the same objects, and a tensor
that a module changes in place has changed for its caller, too.
"""

from collections import UserDict
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

OnTensor = Callable[[Tensor], Tensor]

ORIGINAL = "ds_original"
"""The attribute of a tensor that a module takes: its caller's own one, and its version."""
LONG = 1000
"""A longer list has no tensors, unless the first element is one: to look at all takes too long."""

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""Attributes that torch itself keeps in a module."""


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
    return _mapped(partial(_take if is_taken else _leave, kind), value)


def follow_forward(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """A forward hook, after all others: a backward may also begin at a tensor which forward has
    left in an attribute, like `self.loss`, or in an argument, or in an output of any class.

    Returns the output.
    """
    if transforms_are_active() or not torch.is_grad_enabled():
        return output
    leave = partial(_leave, module.pre_bwd_fn)
    attributes = vars(module)
    for name in [name for name in attributes if name not in _OF_EVERY_MODULE]:
        value = attributes[name]
        if (touched := _mapped(leave, value)) is not value:
            attributes[name] = touched
    for value in args:
        if isinstance(value, Tensor):
            _leave_argument(leave, value)
    for value in (*args, *kwargs.values()):
        if not isinstance(value, Tensor):
            _mapped(partial(_leave_inside, leave), value)
            _map_attributes(partial(_leave_inside, leave), value)
    _map_attributes(leave, output)
    return _mapped(leave, output)


def _take(kind: Any, value: Any) -> Tensor:
    """`value`, for a module: its gradient tells that the module's backward is over."""
    if not (value.requires_grad and torch.is_grad_enabled()):
        return value
    taken = _attached(kind, value)
    setattr(taken, ORIGINAL, (value, value._version))
    return taken


def _leave(kind: Any, value: Any) -> Tensor:
    """`value`, of a module: its gradient begins the module's backward."""
    if value.grad_fn is None or isinstance(value.grad_fn, kind._backward_cls):
        return value
    return _attached(kind, value) if torch.is_grad_enabled() else value


def _leave_argument(leave: OnTensor, value: Tensor) -> Tensor:
    """If a module has changed what it took in place, its caller's tensor has that gradient, too."""
    original, version = vars(value).pop(ORIGINAL, (value, None))
    if version == value._version or value.grad_fn is None:
        return value
    changed = leave(value)  # without a version, it had no gradient before
    _follow(original, changed)
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
    with torch.autograd._unsafe_preserve_version_counter(original):
        _Follow.apply(original, changed)


def _mapped(function: OnTensor, value: Any) -> Any:
    """`value` with `function` applied to its tensors: in lists, dicts and records in place, where
    leaves stay as they are, since they may be parameters; in tuples."""
    match value:
        case Tensor():
            return function(value)
        case list() | tuple() | dict() if not value or (len(value) > LONG and _begins_plain(value)):
            return value
        case list():
            for index, element in enumerate(value):
                if (touched := _mapped_inside(function, element)) is not element:
                    value[index] = touched
        case tuple():
            elements = [_mapped(function, element) for element in value]
            if any(new is not old for new, old in zip(elements, value, strict=True)):
                make = getattr(type(value), "_make", type(value))  # of named ones
                return make(elements)
        case dict():
            for key, element in value.items():
                if (touched := _mapped_inside(function, element)) is not element:
                    value[key] = touched
        case SimpleNamespace() | UserDict():
            _map_attributes(function, value)
        case _ if is_dataclass(value) and not isinstance(value, type):
            for field in fields(value):
                element = getattr(value, field.name, None)
                if (touched := _mapped_inside(function, element)) is not element:
                    object.__setattr__(value, field.name, touched)
    return value


def _mapped_inside(function: OnTensor, element: Any) -> Any:
    is_leaf = isinstance(element, Tensor) and element.grad_fn is None
    return element if is_leaf else _mapped(function, element)


def _begins_plain(value: Any) -> bool:
    return not isinstance(next(iter(value.values() if isinstance(value, dict) else value)), Tensor)


def _map_attributes(function: OnTensor, value: Any) -> None:
    """Applies `function` to the tensors in the attributes of an object of any class."""
    if isinstance(value, Tensor | list | tuple | nn.Module) or callable(value):
        return
    attributes = getattr(value, "__dict__", {})
    for name, element in list(attributes.items()):
        if (touched := _mapped_inside(function, element)) is not element:
            attributes[name] = touched
