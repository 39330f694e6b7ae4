"""Which cases of a parametrized test run without `--slow`."""

from collections.abc import Iterable
from typing import Any

import pytest


def quick(cases: Iterable[Any], *chosen: Any) -> list[Any]:
    """Parameters of all cases, of which those not `chosen` are slow.

    A case is a value, or the tuple of several parameters' values.
    """
    cases = list(cases)
    assert all(case in cases for case in chosen), "a quick case that is not among the cases"
    parameters = (case if isinstance(case, tuple) else (case,) for case in cases)
    return [
        pytest.param(*values, marks=() if case in chosen else pytest.mark.slow)
        for case, values in zip(cases, parameters, strict=True)
    ]
