"""The arguments of an optimizer or a schedule, checked against its signature."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from harness.errors import ConfigError, did_you_mean


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
