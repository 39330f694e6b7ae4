"""Casts floating-point numbers, as bytes, with numpy, which has no bfloat16.

Rounds to nearest, ties to even, as torch does; NaN stays NaN, and values too large for float16
become infinite.
"""

from collections.abc import Callable

import numpy as np

_MOST = np.uint32(0x7F7F8000).view(np.float32)
"""The least float32 that becomes infinite in bfloat16."""
_KINDS = {"float16": np.float16, "float32": np.float32, "float64": np.float64}


def cast(
    data: memoryview | bytes,
    dtype: str,
    target: str,
    on_overflow: Callable[[], object] = lambda: None,
) -> memoryview:
    """Casts bytes from `dtype` to `target`, both in `dtypes.FLOATS`.

    `on_overflow` is called if a finite number becomes infinite.
    """
    numbers = _widened(data) if dtype == "bfloat16" else np.frombuffer(data, _KINDS[dtype])
    # The processor notices an overflow while it casts: that takes no second pass.
    with np.errstate(over="call", invalid="ignore", under="ignore", call=lambda *_: on_overflow()):
        if target == "bfloat16":
            narrow = _narrowed(numbers.astype(np.float32, copy=False), on_overflow)
        else:
            narrow = numbers.astype(_KINDS[target])
    return narrow.view(np.uint8).data


def is_same(one: memoryview, other: memoryview, dtype: str) -> bool:
    """Whether two arrays of numbers are equal, where NaN equals NaN."""
    if np.array_equal(np.frombuffer(one, np.uint8), np.frombuffer(other, np.uint8)):
        return True  # memoryviews would be compared byte by byte, 50 times slower
    wide = (np.frombuffer(cast(data, dtype, "float64"), np.float64) for data in (one, other))
    return np.array_equal(*wide, equal_nan=True)


def _widened(data: memoryview | bytes) -> np.ndarray:
    wide = np.frombuffer(data, np.uint16).astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def _narrowed(numbers: np.ndarray, on_overflow: Callable[[], object]) -> np.ndarray:
    """The upper halves of float32, rounded: adds half a unit in the last place, less 1 if even."""
    bits = numbers.view(np.uint32)
    half = bits >> 16
    half &= 1
    half += 0x7FFF
    half += bits  # wraps around for some NaN only
    half >>= 16
    narrow = half.astype(np.uint16)
    if (
        numbers.size
        and not -_MOST < np.minimum.reduce(numbers) <= np.maximum.reduce(numbers) < _MOST
    ):
        narrow[np.isnan(numbers)] = 0x7FC0
        if (np.isfinite(numbers) & (np.abs(numbers) >= _MOST)).any():
            on_overflow()
    return narrow
