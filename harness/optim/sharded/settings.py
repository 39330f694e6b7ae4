"""Which values the settings of a parameter group may have."""

from collections.abc import Callable, Mapping
from typing import Any

Rules = Mapping[str, Callable[[Any], bool]]
"""By setting, whether a value is valid; for one of another type it may raise TypeError."""


def check_settings(settings: Mapping[str, Any], rules: Rules) -> None:
    """Raises ValueError for a setting that its rule rejects."""
    for key, is_valid in rules.items():
        if not _holds(is_valid, settings[key]):
            raise ValueError(f"{key} = {settings[key]!r} is not valid")


def is_bool(value: Any) -> bool:
    """Whether a value is True or False, and not a text such as "false"."""
    return type(value) is bool


def is_positive_int(value: Any) -> bool:
    """Whether a value is a whole number above 0."""
    return type(value) is int and value > 0


def are_betas(value: Any) -> bool:
    """Whether a value is a pair of decay rates."""
    beta1, beta2 = value
    return 0 <= beta1 < 1 and 0 <= beta2 < 1


def _holds(rule: Callable[[Any], bool], value: Any) -> bool:
    try:
        return bool(rule(value))
    except (TypeError, ValueError):
        return False
