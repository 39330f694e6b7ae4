"""Where the time of a run goes, over all its starts: goodput.jsonl in the run directory.

Each line is a stretch of one start, from `began` to `time` (seconds since the epoch), with the
seconds in each of the `KINDS`. In it the run went on from step `from` to `step`; a line that begins
before the end of the one above it repeats the steps in between. A start's first line goes on where
the start before it has written its last, so that all lines add up to the time of the run; unless
that one was over (`Outcome.is_over`), as its last line then tells by `ended`: from there to the
next start, which extends the run, it was not to train.

Does not import torch.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from harness.errors import counted
from harness.files import JsonLines
from harness.health import outcome
from harness.health.outcome import Outcome

FILE = "goodput.jsonl"
KINDS = {
    "steps": "that count",
    "skipped": "steps that changed nothing",
    "repeated": "steps that were not saved before a restart, or rolled back",
    "saving": "while training waits",
    "evaluating": "",
    "exporting": "",
    "uploading": "at the end of the run, to checkpoint.remote",
    "starting": "from the start of the process to the first step",
    "waiting": "paused, hanging, and from one start to the next",
}
_ACTIVITIES = {"training": "steps", "paused": "waiting"}
"""The kinds of activities that have other names (`metrics/status.py`)."""


class Ledger:
    """Rank 0's clock of what the run does, a sink of its records (`metrics/sinks.py`).

    It writes after each save, and at the end; nothing in between.
    """

    def __init__(self, run_dir: Path, step: int, began: float):
        """`step`: the last one, where the run begins. `began`: when its process did, in seconds
        since the epoch. Raises OSError if the file cannot be opened."""
        path = run_dir / FILE
        lines = read(path)
        last = max((record["time"] for record in lines), default=began)
        alive = _modified(run_dir / "metrics.jsonl")  # when the start before took its last steps
        now = time.time()
        began = min(max(began, last), now)
        if lines and "ended" in lines[-1]:
            last = began
        lost = min(max(last, alive), began) - last
        self._seconds = {"repeated": lost, "waiting": began - last - lost, "starting": now - began}
        self._lines = JsonLines(path)
        self._ended = run_dir / outcome.FILE
        self._clock = time.monotonic()
        self._began, self._now = last, now
        self._from = self._step = step
        self._activity = "training"
        self._skipped = 0.0
        self._write()

    def enter(self, activity: str, step: int) -> None:
        """The run ends what it does, at this step, and begins something else."""
        self._step = step
        was_saving = self._activity == "saving"
        self._pass(activity)
        if was_saving:
            self._write()

    def write(self, record: Mapping[str, Any]) -> None:
        """Takes note of a step that was skipped, and of a return to an earlier step."""
        if record.get("event") == "rollback":
            self._return_to(record["step"])
        if "step_time_s" not in record:  # an evaluation's, or what happened
            return
        self._step = max(self._step, record["step"])
        skipped = sum(value for name, value in record.items() if counts_skips(name))
        if skipped > self._skipped:
            self._add("skipped", record["step_time_s"])
            self._add("steps", -record["step_time_s"])
        self._skipped = skipped

    def _return_to(self, step: int) -> None:
        """The run goes back to this step. Nothing is dropped: the time has passed."""
        self._pass(self._activity)
        self._write()
        self._from = self._step = step

    def close(self) -> None:
        """Writes the last line; the outcome, if the run is over, has been written before it."""
        self._pass(self._activity)
        end = None
        with suppress(OSError):  # as where it is written: the end goes on
            end = Outcome.read(self._ended)
        self._write(**{"ended": end.kind} if end is not None and end.is_over else {})
        self._lines.close()

    def _pass(self, activity: str) -> None:
        """Counts the time of the activity that ends."""
        now = time.monotonic()
        self._add(_ACTIVITIES.get(self._activity, self._activity), now - self._clock)
        self._now += now - self._clock
        self._clock, self._activity = now, activity

    def _add(self, kind: str, seconds: float) -> None:
        self._seconds[kind] = self._seconds.get(kind, 0.0) + seconds

    def _write(self, **more: str) -> None:
        where = {"began": self._began, "time": self._now, "from": self._from, "step": self._step}
        self._lines.write({**where, **self._seconds, **more}, digits=16)
        self._began, self._from, self._seconds = self._now, self._step, {}


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a ledger, without those that a crash has cut short; none without a file."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
            is_complete = record.keys() >= {"began", "time", "from", "step"}
        except (ValueError, AttributeError):
            continue
        if is_complete:
            records.append(record)
    return records


def seconds_by_kind(path: Path) -> dict[str, float]:
    """The seconds of a run in each of the `KINDS`; empty without a ledger."""
    records = read(path)
    total = dict.fromkeys(KINDS, 0.0) if records else {}
    counted: list[tuple[int, int, float]] = []  # first and last step, and seconds of its steps
    for record in records:
        first, last = record["from"], record["step"]
        for kind in KINDS.keys() & record.keys():
            total[kind] += record[kind]
        if "starting" in record or (counted and first < counted[-1][1]):
            before, counted = counted, [_until(first, *stretch) for stretch in counted]
            repeated = sum(seconds for *_, seconds in before) - sum(s for *_, s in counted)
            total["steps"] -= repeated
            total["repeated"] += repeated
        counted.append((first, last, record.get("steps", 0.0)))
    return total


def seconds_in_starts(records: Sequence[Mapping[str, Any]]) -> float:
    """How long the starts of a ledger went on, without the time from one to the next."""
    between = sum(record.get("waiting", 0.0) for record in records if "starting" in record)
    return sum(record["time"] - record["began"] for record in records) - between


def table(path: Path) -> Iterator[str]:
    """Lines that show a ledger; none without one."""
    total = seconds_by_kind(path)
    if not total:
        return
    everything = sum(total.values()) or 1.0
    starts = sum("starting" in record for record in read(path))
    yield f"{path}: {everything:.1f} s, {counted(starts, 'start')}"
    for kind, seconds in total.items():
        yield f"  {kind:<11}{seconds:12.1f} s {seconds / everything:7.1%}  {KINDS[kind]}".rstrip()


def _until(end: int, first: int, last: int, seconds: float) -> tuple[int, int, float]:
    """What remains of a stretch if the run goes on from step `end`."""
    if last < end or (last == end and first < last):
        return first, last, seconds
    share = max(0, end - first) / max(1, last - first)
    return min(first, end), end, seconds * share


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


@cache  # asked for every number of every step
def counts_skips(name: str) -> bool:
    """Whether a metric counts the skipped steps of an engine (not those of APOLLO's projection)."""
    *path, last = name.split("/")
    return last == "skipped" and "apollo" not in path
