"""Which metrics of some runs are drawn, and how."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from harness.report.decimate import decimate, smooth, window_of
from harness.report.run_files import RunFiles

POINTS = 120_000
"""Of all curves together: about 2 MB of the page."""
MOST_INTERVALS = 800
"""Of a curve: more than a chart has pixels, between two of which both extremes are kept."""
BINS = 60
PHASES = {
    "data_time_s": "data",
    "forward_time_s": "forward",
    "backward_time_s": "backward",
    "optimizer_time_s": "optimizer",
}
GIB = 1 << 30

Role = Literal["raw", "mean", "line", "points", "area", "bars"]


@dataclass
class Curve:
    """One line of a chart."""

    run: int
    """The number of its run."""
    label: str
    x: np.ndarray
    """Steps; of bars, their left edges."""
    y: np.ndarray
    role: Role = "line"
    """raw: as measured, behind its smoothed mean; area: the upper edge, from the one below."""


@dataclass
class Chart:
    """Curves with common axes."""

    name: str
    title: str
    section: str
    curves: list[Curve]
    unit: str = ""
    log: bool = False
    wide: bool = False
    by_step: bool = True
    """Whether x is the step."""
    note: str = ""


def charts_of(runs: Sequence[RunFiles]) -> list[Chart]:
    """The charts of some runs, without those that would be empty, with few enough points."""
    charts = [chart for chart in _all(runs) if any(len(curve.x) for curve in chart.curves)]
    curves = [curve for chart in charts if chart.by_step for curve in chart.curves]
    intervals = max(50, min(MOST_INTERVALS, POINTS // (2 * len(curves) or 1)))
    for curve in curves:
        if curve.role == "area":  # the areas of a chart have the same steps
            every = -(-len(curve.x) // intervals)
            curve.x, curve.y = curve.x[::every], curve.y[::every]
        else:
            curve.x, curve.y = decimate(curve.x, curve.y, intervals)
    return charts


def _all(runs: Sequence[RunFiles]) -> Iterator[Chart]:
    names = list(dict.fromkeys(name for run in runs for name in run.metrics.steps.names()))
    evals = list(dict.fromkeys(name for run in runs for name in run.metrics.evaluations.names()))

    def ending(*last: str) -> list[str]:
        return [name for name in names if name.rpartition("/")[2] in last]

    for name in ending("loss"):
        yield _smoothed(runs, name, name.capitalize(), "Training", wide=True)
    for name in evals:
        if name.startswith("eval/"):
            title = f"Evaluation: {name.removeprefix('eval/')}"
            yield Chart(name, title, "Training", _evaluated(runs, name))
    rates = [name for name in names if "lr" in name.split("/")]
    yield Chart("lr", "Learning rate", "Training", _lines(runs, rates))
    for name in ending("grad_norm"):
        yield _smoothed(runs, name, f"Gradient norm{_of(name)}", "Training", log=True)
    for name in ending("skipped", "spikes"):
        if any(np.nanmax(run.metrics.steps[name], initial=0) > 0 for run in runs):
            title = "Skipped steps" if name.endswith("skipped") else "Spikes"
            yield Chart(name, f"{title}{_of(name)}, so far", "Training", _lines(runs, [name]))
    speed = [n for n in ("tokens_per_s", "samples_per_s") if n in names and _varies(runs, n)][:1]
    for name in speed:
        yield _smoothed(runs, name, f"{name.split('_')[0].capitalize()} per second", "Speed")
    yield _smoothed(runs, "step_time_s", "Step time", "Speed", unit="s")
    yield Chart("phases", "What a step spends its time on", "Speed", _phases(runs), unit="s")
    histogram = Chart("histogram", "Histogram of step times", "Speed", _histogram(runs), "steps")
    histogram.by_step = False
    histogram.note = "by their seconds; those beyond the 99.5th percentile are in the last bar"
    yield histogram
    yield Chart("ranks", "What ranks do alone", "Machine", _ranks(runs), "s")
    memory = [name for name in names if "_memory_" in name and name.endswith("_bytes")]
    of_ranks = [name for name in memory if name.split("_")[-2] in ("min", "mean", "max")]
    own = [name for name in memory if name not in of_ranks]
    yield Chart("memory", "Memory of rank 0", "Machine", _memory(runs, own), "GiB")
    yield Chart("ranks_memory", "Memory of all ranks", "Machine", _memory(runs, of_ranks), "GiB")
    for name in _others(runs, names):
        yield _smoothed(runs, name, name, "Other metrics")


def _of(name: str) -> str:
    engine = name.rpartition("/")[0]
    return f" of {engine}" if engine else ""


def _others(runs: Sequence[RunFiles], names: list[str]) -> Iterator[str]:
    """The metrics without a chart of their own, unless they never change."""
    shown = {"step", "time", "epoch", "samples", "tokens", "ranks", "slowest_rank"}
    shown |= {"loss", "lr", "grad_norm", "skipped", "spikes"}
    for name in names:
        parts = name.split("/")
        has_chart = parts[-1] in shown or "lr" in parts or "epoch" in parts
        if has_chart or name.endswith(("_per_s", "_bytes", "_max_rank")) or "_time_" in name:
            continue
        if _varies(runs, name):
            yield name


def _varies(runs: Sequence[RunFiles], name: str) -> bool:
    columns = [run.metrics.steps[name] for run in runs]
    values = np.concatenate([column[np.isfinite(column)] for column in columns])
    return bool(len(values)) and values.min() < values.max()


def _smoothed(
    runs: Sequence[RunFiles],
    name: str,
    title: str,
    section: str,
    unit: str = "",
    log: bool = False,
    wide: bool = False,
) -> Chart:
    curves, windows = [], set()
    for number, run in enumerate(runs):
        x, y = run.metrics.steps["step"], run.metrics.steps[name]
        if not np.nan_to_num(y).any():  # as tokens, where a task counts none
            continue
        windows.add(window := window_of(len(x)))
        curves.append(Curve(number, name, x, y, "raw"))
        curves.append(Curve(number, "mean", x, smooth(y, window), "mean"))
    chart = Chart(name, title, section, curves, unit, log, wide)
    if windows:
        steps = " and ".join(f"{window:,}" for window in sorted(windows))
        chart.note = f"bold: mean of {steps} steps around"
    return chart


def _lines(runs: Sequence[RunFiles], names: Sequence[str], factor: float = 1.0) -> list[Curve]:
    return [
        Curve(number, name, run.metrics.steps["step"], factor * run.metrics.steps[name])
        for number, run in enumerate(runs)
        for name in names
        if np.isfinite(run.metrics.steps[name]).any()
    ]


def _memory(runs: Sequence[RunFiles], names: Sequence[str]) -> list[Curve]:
    curves = _lines(runs, names, 1 / GIB)
    for curve in curves:
        curve.label = curve.label.removesuffix("_bytes").replace("_memory", "").replace("_", " ")
    return curves


def _evaluated(runs: Sequence[RunFiles], name: str) -> list[Curve]:
    found = [(n, run.metrics.evaluations) for n, run in enumerate(runs)]
    return [Curve(n, name, e["step"], e[name], "points") for n, e in found if len(e)]


def _phases(runs: Sequence[RunFiles]) -> list[Curve]:
    """The areas of one run's phases, smoothed, one upon the other."""
    steps = runs[0].metrics.steps
    if len(runs) > 1 or not any(name in steps.names() for name in PHASES):
        return []
    window, total, curves = window_of(len(steps)), np.zeros(len(steps)), []
    for name, label in PHASES.items():
        total = total + np.nan_to_num(smooth(steps[name], window))
        curves.append(Curve(0, label, steps["step"], total, "area"))
    return curves


def _ranks(runs: Sequence[RunFiles]) -> list[Curve]:
    """Of the slowest, the mean and the fastest rank, smoothed."""
    curves = []
    for number, run in enumerate(runs):
        steps = run.metrics.steps
        kinds = (("max", "slowest rank"), ("mean", "mean"), ("min", "fastest rank"))
        for kind, label in kinds if len(runs) == 1 else kinds[:1]:
            y = steps[f"own_time_{kind}_s"]
            if np.isfinite(y).any():
                y = smooth(y, window_of(len(y)))
                curves.append(Curve(number, label, steps["step"], y))
    return curves


def _histogram(runs: Sequence[RunFiles]) -> list[Curve]:
    times = [run.metrics.steps["step_time_s"] for run in runs]
    times = [of_run[np.isfinite(of_run)] for of_run in times]
    if not any(map(len, times)):
        return []
    together = np.concatenate(times)
    low, high = together.min(), np.quantile(together, 0.995)
    edges = np.linspace(low, max(high, low * 1.01), BINS + 1)
    return [
        Curve(n, "steps", edges[:-1], np.histogram(np.minimum(t, edges[-1]), edges)[0], "bars")
        for n, t in enumerate(times)
    ]
