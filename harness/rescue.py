"""What a run still reports and saves before an error ends it."""

import logging
import traceback
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from copy import copy
from dataclasses import replace
from typing import Protocol

from harness import distributed
from harness.checkpoint.save import Saver, SaveResult
from harness.data.step_batches import StepBatches
from harness.data.workers import note_remedy
from harness.distributed.failures import Failures
from harness.distributed.network import is_lost_rank
from harness.distributed.rng import rng_state, set_rng_state
from harness.engine.engines import Engines
from harness.errors import (
    CheckpointError,
    GradientError,
    is_on_all_ranks,
    mark_on_all_ranks,
    summary,
)
from harness.health import phases, watchdog
from harness.health.outcome import Outcome
from harness.metrics.meters import StepMeter, StepNumbers
from harness.metrics.recorder import Recorder
from harness.place import place_of

log = logging.getLogger(__name__)
log_error = distributed.global_leader_only(log.error)

SECONDS_TO_FAIL_TOGETHER = 5.0
"""How long a rank that fails waits for the others to fail in the same place."""


class FailingRun(Protocol):
    """What is rescued: a `trainer.Trainer`."""

    engines: Engines
    batches: StepBatches
    meter: StepMeter
    saver: Saver
    failures: Failures
    begun: "BegunStep | None"
    finishing: bool
    recorder: Recorder

    @property
    def is_saved(self) -> bool: ...

    def drain(self) -> None: ...

    def report(self, done: Sequence[StepNumbers]) -> None: ...

    def save(self) -> str | None: ...

    def finish_save(self, result: SaveResult | None) -> None: ...


class BegunStep:
    """A step in progress: what it changes before any optimizer steps, as it was before."""

    def __init__(self, engines: Engines):
        phases.at_step(engines.global_step + 1)
        self._engines = engines
        self._rng = rng_state()
        self._counters = [copy(engine.counters) for engine in engines.trained]
        self._edits = [engine.edits.count for engine in engines.trained]

    def undo(self) -> bool:
        """Restores the state before the step, except for the model's buffers and the position of
        the data. False if an optimizer has stepped, or weights were edited, which a resumed run
        would do again: they are of neither step."""
        if self._edits != [engine.edits.count for engine in self._engines.trained]:
            return False
        pairs = list(zip(self._engines.trained, self._counters, strict=True))
        for engine, before in pairs:
            taken = engine.counters.micro_step - before.micro_step
            if taken >= engine.gradient_accumulation:
                return False
        for engine, before in pairs:  # steps before this one may have been counted meanwhile
            counted = {"samples": engine.counters.samples, "tokens": engine.counters.tokens}
            engine.counters = replace(before, **counted)
        set_rng_state(self._rng)
        return True


def rescue(run: FailingRun, error: Exception) -> None:
    """Reports the steps that were taken, and saves them, if all ranks fail together.

    They do if the error was raised on all of them, or if each failed in the same place of the same
    step. Otherwise the others can neither sum up metrics nor save: the last records are of rank 0
    alone, with `"ranks": 1`, and only a save in the background that all have written is completed.
    Nothing is saved after a failed save, if the weights are known to be wrong, or once weights have
    been changed in a step.
    """
    place = place_of(run)
    watchdog.fails()
    if not is_lost_rank(error):  # of whose loss the run directory tells more
        Outcome.of(error).write()
    if not is_on_all_ranks(error) and _fails_together(run, error):
        mark_on_all_ranks(error)
    place.note(error)
    note_remedy(error)
    if not is_on_all_ranks(error):
        run.failures.tell("" if is_lost_rank(error) else summary(error), place.step, place.phase)
        for numbers in run.meter.take_own():
            run.recorder.write(numbers.local | numbers.means | {"ranks": 1})
        try:
            run.saver.finish_apart(run.failures.exchange)
        except CheckpointError as save_error:
            log.error("%s", save_error)
        return
    with suppress(GradientError) if isinstance(error, GradientError) else nullcontext():
        run.drain()  # which may find the same in the next step
        run.drain()  # of a step that failed before its exchange
    run.report(run.meter.take())
    if isinstance(error, CheckpointError | GradientError):
        return
    try:
        run.finish_save(run.saver.wait())  # one in the background, of this step or an earlier one
        if not run.is_saved:
            _save(run, error)
    except CheckpointError as save_error:
        log_error("%s", save_error)


def _save(run: FailingRun, error: Exception) -> None:
    """Saves the last complete step, if that is possible."""
    what = summary(error)
    if run.begun is not None and not (run.batches.can_rewind and run.begun.undo()):
        log_error("%s\nno checkpoint is saved: the error came in the middle of a step", what)
        return
    log_error("%s\nsaving a checkpoint before the run ends", what)
    run.finishing = True
    run.save()
    run.finish_save(run.saver.wait())


def _fails_together(run: FailingRun, error: Exception) -> bool:
    """Whether all ranks fail with such an error in the same place of the same step."""
    if is_lost_rank(error) or isinstance(error, GradientError):
        return False
    lines = (f"{file}:{line}" for file, line, *_ in traceback.extract_tb(error.__traceback__))
    how = " ".join([f"step {run.engines.global_step}", type(error).__name__, *lines])
    return run.failures.is_joint(how, SECONDS_TO_FAIL_TOGETHER)
