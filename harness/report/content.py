"""All that a page shows of some runs, as JSON."""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from harness import __version__
from harness.report.charts import Chart, charts_of
from harness.report.decimate import decimate
from harness.report.marks import Kind, Mark, marks_of
from harness.report.run_files import RunFiles
from harness.report.summary import summarize

MOST_MARKS = 3000
"""Of all runs; of those that are most frequent in a long run some are left out first."""
KNOTS = 500
"""Of the curve from a run's steps to its hours or tokens."""
_FREQUENT: tuple[Kind, ...] = ("evaluation", "save", "export", "warning")


def content_of(runs: Sequence[RunFiles], live_s: float = 0.0) -> dict[str, Any]:
    """The page's data. `live_s`: seconds after which it asks for them again; 0: never."""
    share = MOST_MARKS // len(runs)
    return {
        "made": time.time(),
        "version": __version__,
        "live_s": live_s,
        "runs": [_run(run, share) for run in runs],
        "charts": [_chart(chart) for chart in charts_of(runs)],
        "differences": differences(runs),
    }


def differences(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    """The keys of the configs whose values differ, with the value of each run."""
    keys = sorted({key for run in runs for key in run.settings} - {"run.name", "run.dir"})
    rows = [(key, [_shown(run.setting(key)) for run in runs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _run(run: RunFiles, most_marks: int) -> dict[str, Any]:
    steps = run.metrics.steps
    marks = marks_of(run)
    chosen = _most_important(marks, most_marks)
    axes = {name: steps[name] for name in ("time", "tokens")}
    began = None
    if np.isfinite(axes["time"]).any():
        began = run.starts[0]["began"] if run.starts else float(np.nanmin(axes["time"]))
        axes["time"] = (axes["time"] - began) / 3600
    return {
        **asdict(summarize(run)),
        "path": str(run.path),
        "began": began,
        "marks": [_mark(mark) for mark in chosen],
        "marks_left_out": len(marks) - len(chosen),
        "axes": {name: _axis(steps["step"], y) for name, y in axes.items()},
        "config": run.config_text,
    }


def _most_important(marks: list[Mark], most: int) -> list[Mark]:
    frequent = [mark for mark in marks if mark.kind in _FREQUENT]
    room = max(0, most - (len(marks) - len(frequent)))
    every = max(1, math.ceil(len(frequent) / room)) if room else 1
    kept = {id(mark) for mark in frequent[::every]} if room else set()
    return [m for m in marks if m.kind not in _FREQUENT or id(m) in kept][:most]


def _mark(mark: Mark) -> list[Any]:
    step = None if mark.step is None else int(mark.step)
    return [mark.time, step, mark.kind, mark.text[:400]]


def _axis(x: np.ndarray, y: np.ndarray) -> list[list[float]] | None:
    """Steps and their values, to be interpolated; None if there are none, or all are 0."""
    if not np.nan_to_num(y).any():
        return None
    return [_rounded(values, 8) for values in decimate(x, y, KNOTS)]


def _chart(chart: Chart) -> dict[str, Any]:
    curves = [
        asdict(curve) | {"x": _rounded(curve.x, 9), "y": _rounded(curve.y)}
        for curve in chart.curves
    ]
    return asdict(chart) | {"curves": curves}


def _rounded(values: np.ndarray, digits: int = 5) -> list[float]:
    """Numbers that are short in JSON."""
    numbers = [float(f"{value:.{digits}g}") for value in values.tolist()]
    return [int(number) if number.is_integer() else number for number in numbers]


def _shown(value: Any) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
