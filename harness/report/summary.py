"""The figures above the charts: losses, times, where the time has gone."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from harness.health.goodput import KINDS
from harness.metrics.status import format_duration
from harness.report.charts import PHASES
from harness.report.decimate import smooth, window_of
from harness.report.run_files import RunFiles


@dataclass
class Share:
    """A part of some time."""

    label: str
    seconds: float
    text: str = ""


@dataclass
class Summary:
    """What is known of a run as a whole."""

    name: str
    state: str
    reason: str
    figures: dict[str, str] = field(default_factory=dict)
    """By their names, as text."""
    goodput: list[Share] = field(default_factory=list)
    """Where the time has gone."""
    phases: list[Share] = field(default_factory=list)
    """What a step spends its time on, on average."""
    slowest: list[tuple[int, float, str]] = field(default_factory=list)
    """The ranks that were the slowest most often: in which part of the steps, and in which phase
    they were most often slower than the others, empty if in none."""


def summarize(run: RunFiles) -> Summary:
    """The summary of a run."""
    outcome = run.outcome
    state = outcome.kind if outcome else "running"
    reason = outcome.reason if outcome else "no end has been recorded yet"
    seconds = run.seconds_by_kind
    return Summary(
        name=run.path.resolve().name,
        state=state.replace("_", " "),
        reason=reason,
        figures=_figures(run),
        goodput=[Share(kind, seconds[kind], KINDS[kind]) for kind in seconds],
        phases=_phases(run),
        slowest=_slowest(run),
    )


def best_evaluation(run: RunFiles) -> tuple[str, float, int] | None:
    """Metric, value and step of the best evaluation, by `checkpoint.best_metric`."""
    evaluations = run.metrics.evaluations
    name = run.setting("checkpoint.best_metric", "eval/loss")
    values = evaluations[name]
    if not np.isfinite(values).any():
        return None
    is_max = run.setting("checkpoint.best_mode", "min") == "max"
    row = int(np.nanargmax(values) if is_max else np.nanargmin(values))
    return name, float(values[row]), int(evaluations["step"][row])


def _figures(run: RunFiles) -> dict[str, str]:
    steps = run.metrics.steps
    found: dict[str, str] = {}
    if len(steps):
        last, of = int(steps["step"][-1]), run.setting("run.steps")
        found["Steps"] = f"{last:,} of {of:,}" if of else f"{last:,}"
    losses = [name for name in steps.names() if name.rpartition("/")[2] == "loss"]
    for name in losses[:3]:
        mean = smooth(steps[name], window_of(len(steps)))[-1]
        found[name.capitalize()] = f"{mean:.4g}"
    if best := best_evaluation(run):
        found[f"Best {best[0]}"] = f"{best[1]:.4g} at step {best[2]:,}"
    if seconds := sum(run.seconds_by_kind.values()):
        found["Time"] = format_duration(seconds)
        found["Goodput"] = f"{run.seconds_by_kind['steps'] / seconds:.1%}"
        found["Starts"] = str(len(run.starts))
    for name in ("tokens_per_s", "samples_per_s"):
        if (speed := _median(steps[name])) and "Speed" not in found:
            found["Speed"] = f"{_short(speed)} {name.split('_')[0]}/s"
    if tokens := np.nanmax(steps["tokens"], initial=0):
        found["Tokens"] = _short(tokens)
    skipped = [n for n in steps.names() if n.rpartition("/")[2] == "skipped"]
    found["Skipped steps"] = f"{int(sum(np.nanmax(steps[n], initial=0) for n in skipped)):,}"
    return found


def _phases(run: RunFiles) -> list[Share]:
    steps = run.metrics.steps
    if not any(name in steps.names() for name in PHASES):
        return []
    means = {label: _mean(steps[name]) for name, label in PHASES.items()}
    return [Share(label, seconds) for label, seconds in means.items()]


def _slowest(run: RunFiles) -> list[tuple[int, float, str]]:
    steps = run.metrics.steps
    ranks = steps["slowest_rank"]
    ranks = ranks[np.isfinite(ranks)].astype(int)
    of_phases = {label: steps[f"own_{name[:-2]}_max_rank"] for name, label in PHASES.items()}
    found = []
    for rank, count in Counter(ranks.tolist()).most_common(8):
        slower = {label: int((slowest == rank).sum()) for label, slowest in of_phases.items()}
        phase = max(slower, key=lambda label: slower[label])
        found.append((rank, count / len(ranks), phase if slower[phase] else ""))
    return found


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else 0.0


def _median(values: np.ndarray) -> float:
    return float(np.nanmedian(values)) if np.isfinite(values).any() else 0.0


def _short(number: float) -> str:
    """Like 12.3 M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"
