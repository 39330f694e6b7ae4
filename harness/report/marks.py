"""What happened in a run besides its steps: commands, saves, restarts, faults."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from harness.report.run_files import RunFiles

Kind = Literal[
    "command", "fault", "restart", "resume", "warning", "save", "export", "evaluation", "end"
]

_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (?:rank \d+|supervisor) ([A-Z]+) (.*)")
_RESULT = re.compile(r"(saved|exported|resumed from) (\S.*/step-(\d+)\S*)")
_STEP = re.compile(r"\bstep (\d+)\b")
_KINDS: dict[str, Kind] = {"saved": "save", "exported": "export", "resumed from": "resume"}
_LEVELS: dict[str, Kind] = {"WARNING": "warning", "ERROR": "fault", "CRITICAL": "fault"}
_SHOWN_BY_RESULT = re.compile(r"(save|export|eval)\b")
"""Commands whose results are marks of their own."""


@dataclass(frozen=True)
class Mark:
    """One of them."""

    time: float | None
    """Seconds since the epoch."""
    step: float | None
    """The last step then; None if that is not known."""
    kind: Kind
    text: str


def marks_of(run: RunFiles) -> list[Mark]:
    """All marks of a run in the order of their times."""
    found = [*_of_commands(run), *_of_log(run), *_of_evaluations(run), *_of_end(run)]
    steps, times = run.metrics.steps["step"], run.metrics.steps["time"]
    known = np.isfinite(times)
    steps, times = steps[known], times[known]
    placed = [_placed(mark, steps, times) for mark in found] if len(steps) else found
    return sorted(placed, key=lambda mark: (mark.time or 0.0, mark.step or 0.0))


def _of_commands(run: RunFiles) -> Iterator[Mark]:
    for record in run.commands:
        text, state, result = (str(record.get(k, "")) for k in ("text", "state", "result"))
        if record.get("front") == "supervisor":
            yield Mark(record["time"], record.get("step"), "restart", f"{text}: {result}")
        elif state in ("failed", "rejected"):
            reason = result.removeprefix(f"{text!r}: ")
            yield Mark(record["time"], record.get("step"), "command", f"{text}: {state}: {reason}")
        elif state == "done" and not _SHOWN_BY_RESULT.match(text):
            yield Mark(record["time"], record.get("step"), "command", f"{text}: {result}")


def _of_log(run: RunFiles) -> Iterator[Mark]:
    for line in run.log:
        match = _LINE.match(line)
        if match is None or " supervisor " in line[:32]:
            continue
        time, level, text = datetime.fromisoformat(match[1]).timestamp(), match[2], match[3]
        if level in _LEVELS:
            step = _STEP.search(text)
            yield Mark(time, int(step[1]) if step else None, _LEVELS[level], text)
        elif result := _RESULT.match(text):
            name = Path(result[2]).name
            yield Mark(time, int(result[3]), _KINDS[result[1]], f"{result[1]} {name}")


def _of_evaluations(run: RunFiles) -> Iterator[Mark]:
    evaluations = run.metrics.evaluations
    names = [name for name in evaluations.names() if name.startswith("eval/")]
    columns = {name: evaluations[name] for name in names}
    times = evaluations["time"]
    for row, step in enumerate(evaluations["step"]):
        values = {name: column[row] for name, column in columns.items()}
        shown = ", ".join(f"{n} {v:.4g}" for n, v in values.items() if not np.isnan(v))
        time = None if np.isnan(times[row]) else float(times[row])
        yield Mark(time, float(step), "evaluation", shown)


def _of_end(run: RunFiles) -> Iterator[Mark]:
    if run.outcome is not None:
        outcome: Any = run.outcome
        yield Mark(outcome.time, outcome.step, "end", f"{outcome.kind}: {outcome.reason}")


def _placed(mark: Mark, steps: np.ndarray, times: np.ndarray) -> Mark:
    """With its step from its time, or its time from its step, where it lacks one: both (N,)."""
    if mark.step is None and mark.time is not None:
        row = np.searchsorted(times, mark.time, side="right") - 1
        step = float(steps[row]) if row >= 0 else float(steps[0]) - 1
        return Mark(mark.time, step, mark.kind, mark.text)
    if mark.time is None and mark.step is not None:
        row = min(int(np.searchsorted(steps, mark.step)), len(times) - 1)
        return Mark(float(times[row]), mark.step, mark.kind, mark.text)
    return mark
