"""The arguments of an optimizer or a schedule, checked against its signature."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

from harness.errors import ConfigError, did_you_mean

Steps = Annotated[int, "steps"]
"""Annotation of a number of steps, which a config may also give as a ratio of the total, below 1.
"""


def check_arguments(
    label: str, function: Callable[..., Any], args: Mapping[str, Any], extra: Sequence[str] = ()
) -> None:
    """Raises ConfigError if an argument is neither a parameter of `function` nor in `extra`.

    The caller passes the first parameter and `lr` itself. A function with `**kwargs` accepts any
    key.
    """
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    known = [*(name for name in list(parameters)[1:] if name != "lr"), *extra]
    for key in args:
        if key not in known:
            hint = did_you_mean(key, known)
            raise ConfigError(f"{label}: unknown key {key!r}{hint}; known: {', '.join(known)}")


def converted(label: str, key: str, value: Any, kind: Any, total_steps: int) -> Any:
    """An argument of a schedule as the annotation `kind` wants it: a number >= 0, a whole number
    >= 1 (int), whole `Steps`, a text, or one of the values of a Literal. Raises ConfigError."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_valid = is_number and 0 <= value < math.inf
    expected = "a number >= 0"
    if kind == Steps:
        expected = "whole steps, or a ratio of the total steps below 1"
        if is_valid and 0 < value < 1:
            return max(1, round(value * total_steps))
        is_valid = is_valid and value == int(value)
    elif kind is int:
        expected = "a whole number >= 1"
        is_valid = is_valid and value == int(value) and value >= 1
    elif kind is str:
        expected, is_valid = "a text", isinstance(value, str)
    elif get_origin(kind) is Literal:
        choices = get_args(kind)
        expected, is_valid = " or ".join(map(repr, choices)), value in choices
    if not is_valid:
        raise ConfigError(f"{label}: {key} = {value!r}, expected {expected}")
    return int(value) if kind in (Steps, int) else value
