"""What follows a step that was skipped: nothing, or the end of the run.

Every rank decides the same by itself: that a step is skipped follows from the reduced gradient's
norm. Each engine skips for itself, since the others' steps do not depend on its own; whether the
run ends is decided for all of them together, by the first whose policy says so.
"""

from collections.abc import Sequence
from typing import NoReturn, Protocol

from harness.checkpoint.save import Saver
from harness.control.live import LiveConfig
from harness.engine.engines import Engines
from harness.errors import NonFiniteError
from harness.health.skips import WHAT, Skip


class RecoveringRun(Protocol):
    """What recovers: a `trainer.Trainer`."""

    live: LiveConfig
    engines: Engines
    saver: Saver


def recover(run: RecoveringRun) -> None:
    """What `[health]` says to the step that was just taken.

    Raises NonFiniteError, on all ranks, if the run ends: `rescue` then saves what it has, which the
    skipped steps have not changed.
    """
    settings = run.live.config.health
    skips = [s for s in run.engines.skips.of(run.engines.global_step) if s.reason != "overflow"]
    nonfinite = [skip for skip in skips if skip.reason == "nonfinite"]
    if nonfinite and settings.nonfinite == "stop":
        _stop(run, nonfinite, "health.nonfinite = 'stop'")
    if too_many := [skip for skip in skips if skip.in_a_row >= settings.most_skipped]:
        _stop(run, too_many, f"health.most_skipped = {settings.most_skipped}")


def check_end(run: RecoveringRun) -> None:
    """Raises NonFiniteError, on all ranks, if an engine's last steps were skipped: the launcher
    must not take such a run for a complete one."""
    for engine in run.engines.trained:
        if count := engine.counters.skipped_in_a_row:
            steps = f"its last {count} steps were" if count > 1 else "its last step was"
            _raise(f"the run has ended, but engine {engine.name!r} does not train: {steps} skipped")


def _stop(run: RecoveringRun, skips: Sequence[Skip], key: str) -> NoReturn:
    skip = skips[0]
    count = f", the last {skip.in_a_row} steps in a row" if skip.in_a_row > 1 else ""
    text = f"step {skip.step}: engine {skip.engine!r}: skipped, as {WHAT[skip.reason]}{count}"
    run.saver.note = f"saved as the run ended: {text}"
    _raise(f"{text} ({key})")


def _raise(text: str) -> NoReturn:
    error = NonFiniteError(text)
    error.on_all_ranks = True
    raise error
