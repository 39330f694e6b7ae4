"""The closing summary of a run: what it has reached, where that lies, and what to type next."""

import json
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from harness.config import Config
from harness.errors import counted
from harness.health import goodput
from harness.health.goodput import counts_skips
from harness.health.outcome import Outcome
from harness.metrics.sinks import EVENT
from harness.metrics.status import format_duration

log = logging.getLogger(__name__)


@dataclass
class _Series:
    """The values of a metric at the steps of this run."""

    mode: Literal["min", "max"] | None
    """Which values are better; None if nothing says."""
    values: list[tuple[int, float]] = field(default_factory=list)
    """The last one, and those before it that were the best so far."""

    def add(self, step: int, value: float) -> None:
        if len(self.values) > 1 and not self._is_better(self.values[-1][1], self.values[-2][1]):
            self.values.pop()
        self.values.append((step, value))

    def _is_better(self, value: float, other: float) -> bool:
        return value > other if self.mode == "max" else value < other

    def truncate(self, step: int) -> None:
        self.values = [entry for entry in self.values if entry[0] <= step]

    def __str__(self) -> str:
        last, best = self.values[-1], self.values[-1]
        if self.mode is None:
            return f"{last[1]:.4g}"
        if len(self.values) > 1 and not self._is_better(last[1], self.values[-2][1]):
            best = self.values[-2]
        if best == last:
            return f"{last[1]:.4g}, the best"
        return f"{last[1]:.4g}, best {best[1]:.4g} at step {best[0]}"


class Closing:
    """A sink of the records (`metrics/sinks.py`), which remembers the last and the best ones."""

    def __init__(self, config: Config, step: int):
        """`step`: where the run begins. Evaluations of earlier starts are read from
        metrics.jsonl, and losses count from here."""
        self._config = config
        self._from = step
        self._series: dict[str, _Series] = {}
        self._skipped: dict[str, int] = {}
        self._spikes: dict[str, int] = {}
        self._counts_of_spikes = {"spikes", *(f"{name}/spikes" for name in config.engines)}
        path = config.run_dir / "metrics.jsonl"
        for line in path.open("rb") if step and path.is_file() else ():
            if b'"eval/' in line:
                self.write(json.loads(line))

    def write(self, record: Mapping[str, Any]) -> None:
        """Takes note of losses, evaluations, skipped steps and spikes, and of a rollback."""
        if record.get(EVENT) == "rollback":
            for series in self._series.values():
                series.truncate(record["step"])
        for name, value in record.items():
            if counts_skips(name):
                self._skipped[name] = value
            elif name in self._counts_of_spikes:
                self._spikes[name] = value
            elif _is_summarized(name):
                number = float(value)
                if number == number:
                    self._of(name).add(record["step"], number)

    def _of(self, name: str) -> _Series:
        settings = self._config.checkpoint
        mode = "min" if name.rpartition("/")[2] == "loss" else None
        if name == settings.best_metric:
            mode = settings.best_mode
        return self._series.setdefault(name, _Series(mode))

    def close(self) -> None:
        """Nothing is open."""

    def log(self, outcome: Outcome, best: Path | None) -> None:
        """Logs the summary, once the run has ended without an error. `best`: the best checkpoint,
        if one is linked."""
        for line in self.lines(outcome, best):
            log.info("%s", line)

    def lines(self, outcome: Outcome, best: Path | None = None) -> Iterator[str]:
        """The lines of the summary."""
        run_dir, steps = self._config.run_dir, self._config.run.steps
        ledger = goodput.read(run_dir / goodput.FILE)
        since_last = max(0.0, time.time() - ledger[-1]["time"]) if ledger else 0.0
        seconds = goodput.seconds_in_starts(ledger) + since_last
        starts = sum("starting" in record for record in ledger)
        again = f" in {starts} starts" if starts > 1 else ""
        yield f"{outcome.kind}: step {outcome.step} after {format_duration(seconds)}{again}"
        since = f" (since step {self._from})" if self._from else ""
        for name, series in self._series.items():
            if series.values:
                yield f"{name} {series}{'' if name.startswith('eval/') else since}"
        if skipped := sum(self._skipped.values()):
            yield "1 step was skipped" if skipped == 1 else f"{skipped} steps were skipped"
        if spikes := sum(self._spikes.values()):
            yield counted(spikes, "spike") + " of loss or gradient norm"
        for what in ("checkpoints", "exports"):
            saved = (run_dir / what).glob("step-*")
            if found := sorted(path for path in saved if path.suffix not in (".tmp", ".kept")):
                yield f"{what}: {len(found)}, the newest is {found[-1]}"
        if best is not None:
            yield f"best saved by {self._config.checkpoint.best_metric}: {best}"
        run = _shown(run_dir)
        goes_on = outcome.kind != "complete" and (outcome.step or 0) < steps
        options = self._engine_option() + (" --best" if best else "")
        then = f"harness convert {run} {run}.sft{options}"
        if goes_on:
            then = "a start with the same run.name resumes it"
        yield f"next: harness report {run}; {then}"

    def _engine_option(self) -> str:
        """For `harness convert`, if a checkpoint has several engines: the one that is ranked."""
        trained = [name for name, e in self._config.engines.items() if e.role == "train"]
        if len(trained) < 2:
            return ""
        ranked = set(self._config.checkpoint.best_metric.split("/"))
        return f" --engine {next((name for name in trained if name in ranked), trained[0])}"


@cache  # asked for every number of every step
def _is_summarized(name: str) -> bool:
    return name.startswith("eval/") or name.rpartition("/")[2] == "loss"


def _shown(path: Path) -> Path:
    """As short as it can be typed here."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
