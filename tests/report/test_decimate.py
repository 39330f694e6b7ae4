"""Fewer points of a curve, and its smoothed mean."""

import numpy as np
import pytest

from harness.report.decimate import decimate, smooth


def test_extremes_and_ends_of_a_long_curve_remain() -> None:
    rng = np.random.default_rng(0)
    x, y = np.arange(100_000.0), rng.normal(size=100_000)
    y[[17, 54_321]] = 90, -80
    y[777] = np.nan
    xs, ys = decimate(x, y, 500)
    assert len(xs) <= 1002 and (xs[0], xs[-1]) == (0, 99_999)
    assert (ys == y[xs.astype(int)]).all(), "every point is one of the curve"
    assert ys.max() == 90 and ys.min() == -80
    bins = np.minimum(x * 500 // 99_999, 499)
    for number in (0, 1, 250, 499):  # of each interval both
        inside = y[(bins == number) & np.isfinite(y)]
        assert {inside.min(), inside.max()} <= set(ys)


def test_a_short_curve_stays_as_it_is_without_what_is_not_finite() -> None:
    x, y = decimate(np.arange(4.0), np.array([1, np.nan, np.inf, 2.0]), 2)
    assert (x.tolist(), y.tolist()) == ([0, 3], [1, 2])
    assert len(decimate(np.empty(0), np.empty(0), 5)[0]) == 0


def test_a_curve_with_long_gaps() -> None:
    x = np.concatenate([np.arange(50.0), np.arange(1e6, 1e6 + 50)])
    xs, _ = decimate(x, x, 10)
    assert set(xs) == {0, 49, 1e6, 1e6 + 49}


def test_smoothing_is_the_mean_of_the_finite_values_around() -> None:
    y = np.array([np.nan, 1, 2, np.nan, 6, 7])
    assert np.isnan(smooth(y, 1)[0])
    assert smooth(y, 3) == pytest.approx([1, 1.5, 1.5, 4, 6.5, 6.5])
