"""The charts of a report as PNG, by matplotlib."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from harness.errors import HarnessError
from harness.files import write_atomically
from harness.report.charts import Chart, charts_of
from harness.report.marks import marks_of
from harness.report.run_files import RunFiles

COLORS = ("#3556d6", "#d9622b", "#16916f", "#a441b8", "#c22f55", "#8a6d0b", "#0c85a8", "#5c6470")
SHOWN = {"command": "#3556d6", "fault": "#cf2b3c", "restart": "#d9622b", "resume": "#16916f"}
"""The marks that are drawn."""
_WIDTHS = {"raw": 0.7, "mean": 1.8}
_STYLES = ("-", "--", ":", "-.")
"""Of the lines of a run, if there are several runs."""


def write_pictures(runs: Sequence[RunFiles], directory: Path) -> Iterator[Path]:
    """Writes each chart into the folder, and yields its path.

    Raises HarnessError if matplotlib is not installed, and OSError if a file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise HarnessError(
            "pictures need matplotlib: pip install 'deepspeed-harness[report]'"
        ) from None
    directory.mkdir(parents=True, exist_ok=True)
    for chart in charts_of(runs):
        figure = Figure(figsize=(8 if chart.wide else 5.2, 3.4), dpi=160, layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(chart.title + (f", {chart.unit}" if chart.unit else ""), loc="left")
        axes.set_xlabel("step" if chart.by_step else "s")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e3e6eb", linewidth=0.7)
        axes.set_axisbelow(True)
        if chart.log:
            axes.set_yscale("log")
        _draw_curves(axes, chart, runs)
        if chart.by_step:
            _draw_marks(axes, runs)
        target = directory / f"{chart.name.replace('/', '-')}.png"
        write_atomically(target, partial(figure.savefig, format="png"))
        yield target


def _draw_curves(axes: Any, chart: Chart, runs: Sequence[RunFiles]) -> None:
    counts: dict[int, int] = {}
    below = 0
    for curve in chart.curves:
        key = curve.run if len(runs) > 1 else 0
        if curve.role != "mean":
            counts[key] = counts.get(key, -1) + 1
        color = COLORS[(curve.run if len(runs) > 1 else counts[key]) % len(COLORS)]
        name = runs[curve.run].path.resolve().name
        label = name if curve.role in ("mean", "points", "bars") else f"{name}: {curve.label}"
        if curve.role == "area":
            axes.fill_between(curve.x, below, curve.y, color=color, alpha=0.7, label=curve.label)
            below = curve.y
        elif curve.role == "bars":
            width = curve.x[1] - curve.x[0]
            axes.bar(curve.x, curve.y, width, align="edge", color=color, alpha=0.6, label=label)
        else:
            is_raw = curve.role == "raw"
            is_one_of_many = len(runs) > 1 and curve.role == "line"
            axes.plot(
                curve.x,
                curve.y,
                color=color,
                alpha=0.35 if is_raw else 1,
                linewidth=_WIDTHS.get(curve.role, 1.4),
                linestyle=_STYLES[counts[key] % 4] if is_one_of_many else "-",
                marker="o" if curve.role == "points" else None,
                markersize=3,
                label=None if is_raw else label if len(runs) > 1 else curve.label,
            )
    axes.legend(frameon=False, fontsize=8)


def _draw_marks(axes: Any, runs: Sequence[RunFiles]) -> None:
    for run in runs:
        for mark in marks_of(run):
            if mark.kind in SHOWN and mark.step is not None:
                axes.axvline(mark.step, color=SHOWN[mark.kind], linewidth=0.7, alpha=0.6)
