"""Fewer points of a long curve, without losing its extremes."""

import numpy as np

Floats = np.ndarray


def decimate(x: Floats, y: Floats, intervals: int) -> tuple[Floats, Floats]:
    """The first and the last point, and of each of so many equal intervals of x those with the
    least and the greatest y.

    x: float64 (N,), ascending; y: float64 (N,), whose values that are not finite are left out.
    At most 2 * `intervals` + 2 points are returned, all of them points of the curve.
    """
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) <= 2 * intervals:
        return x, y
    edges = np.searchsorted(x, np.linspace(x[0], x[-1], intervals + 1)[1:-1])
    keep = [0, len(x) - 1]
    for begin, end in zip([0, *edges], [*edges, len(x)], strict=True):
        if begin < end:
            keep += [begin + int(y[begin:end].argmin()), begin + int(y[begin:end].argmax())]
    chosen = np.unique(keep)
    return x[chosen], y[chosen]


def smooth(y: Floats, window: int) -> Floats:
    """The mean of the `window` values around each, of those that are finite; NaN where there are
    none. At its ends, of those that are there."""
    finite = np.isfinite(y)
    totals = np.concatenate([[0.0], np.cumsum(np.where(finite, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    ends = np.minimum(np.arange(1, len(y) + 1) + window // 2, len(y))
    begins = np.maximum(np.arange(len(y)) - (window - 1) // 2, 0)
    found = counts[ends] - counts[begins]
    return np.where(found > 0, totals[ends] - totals[begins], np.nan) / np.maximum(found, 1)


def window_of(points: int) -> int:
    """Over how many of a curve's points it is smoothed: 2 percent."""
    return max(1, points // 50)
