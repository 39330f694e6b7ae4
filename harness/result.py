"""What a run has left behind, read from its directory."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import distributed
from harness.config import Config
from harness.convert.resolve_source import LATEST
from harness.errors import Kind
from harness.health import outcome
from harness.health.outcome import Outcome


@dataclass(frozen=True)
class Result:
    """A run that has ended in order, the same on every rank."""

    metrics: dict[str, float]
    """The last numbers of the run: those of its last step, and of its last evaluation
    (`eval/...`)."""
    best: dict[str, float] | None
    """The evaluation that is best by `checkpoint.best_metric`, with its `step`; None without one.
    """
    checkpoint: Path | None
    """The newest checkpoint; None if the run has none."""
    exports: Path | None
    """The directory of the newest exports, with ENGINE.sft of each trained engine, or what its
    exporter writes; None without."""
    run_dir: Path
    """The run's directory."""
    ended: Kind
    """How it has ended: "complete", or "quit" by a command or a callback."""


def result_of(config: Config) -> Result:
    """The result of a run that has just ended, as rank 0 finds it. Collective. Raises HarnessError,
    on all ranks, if its directory cannot be read."""
    found = None
    with distributed.raise_on_all_ranks(f"run directory {config.run_dir}"):
        if distributed.is_global_leader():
            found = _read(config)
    found = distributed.broadcast(found)
    assert found is not None
    return found


def _read(config: Config) -> Result:
    run_dir = config.run_dir
    ended = Outcome.read(run_dir / outcome.FILE)
    last: dict[str, float] = {}
    best, sign = None, 1 if config.checkpoint.best_mode == "min" else -1
    metric, least = config.checkpoint.best_metric, math.inf
    for record in _records(run_dir / "metrics.jsonl"):
        last |= record
        if sign * record.get(metric, math.nan) < least:
            best, least = record, sign * record[metric]
    latest = run_dir / "checkpoints" / LATEST
    exports = sorted((run_dir / "exports").glob("step-????????"))
    return Result(
        metrics=last,
        best=best,
        checkpoint=latest.parent / latest.read_text().strip() if latest.is_file() else None,
        exports=exports[-1] if exports else None,
        run_dir=run_dir,
        ended="complete" if ended is None else ended.kind,
    )


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    if path.is_file():
        with path.open() as file:
            yield from map(json.loads, file)
