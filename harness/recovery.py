"""What follows a step that was skipped, or is a spike: nothing, a rollback, or the end of the run.

Every rank decides the same by itself: that a step is skipped follows from the reduced gradient's
norm, and what is a spike from numbers that are summed over the ranks. Each engine skips for itself,
since the others' steps do not depend on its own; a rollback, or the end, is of all together.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import monotonic
from typing import Any, NoReturn, Protocol

from harness import distributed
from harness.callbacks.moments import Callbacks
from harness.checkpoint.resume import last_good, restore
from harness.checkpoint.save import Saver, SaveResult
from harness.control.bus import Bus
from harness.control.commands import Interrupt, Quit
from harness.control.live import LiveConfig
from harness.data.sampler import Span
from harness.data.step_batches import StepBatches, Terms
from harness.engine.blame import KeptStep
from harness.engine.engines import Engines
from harness.errors import NonFiniteError
from harness.health.skips import WHAT, Skip
from harness.health.spikes import SpikeWarnings
from harness.metrics.meters import StepNumbers
from harness.metrics.progress import Progress
from harness.metrics.recorder import Recorder
from harness.metrics.status import Status

log = logging.getLogger(__name__)
log_warning = distributed.global_leader_only(log.warning)

FITTED = "fitted"
"""The name of the starting point of a run that has resumed with another model, or other data."""


class RecoveringRun(Protocol):
    """What recovers: a `trainer.Trainer`."""

    live: LiveConfig
    engines: Engines
    batches: StepBatches
    saver: Saver
    bus: Bus
    kept_step: KeptStep | None
    spike_warnings: SpikeWarnings
    ending: Quit | None
    finishing: bool
    recorder: Recorder
    callbacks: Callbacks
    status: Status
    progress: Progress

    def drain(self) -> None: ...

    def save(self, name: str | None = None) -> str | None: ...

    def finish_save(self, result: SaveResult | None) -> None: ...

    def returned(self) -> None: ...


def prepare(run: RecoveringRun) -> None:
    """Saves the starting point, if a rollback would have nothing to return to: no checkpoint, or
    none of this model and this data. Collective."""
    settings = run.live.config.health
    if "rollback" not in (settings.nonfinite, settings.spike):
        return
    if run.saver.begins_changed:
        run.save(FITTED)  # beside the checkpoint of before, which stays
    elif _last_good(run, run.engines.global_step + 1) is None:
        run.save()


def begin_step(run: RecoveringRun, batches: Iterator[Any], terms: Terms | None) -> Iterator[Any]:
    """Before a step: sets the largest norms that are taken; keeps the micro-batches, which it
    returns, if the step may have to be run again."""
    settings, engines = run.live.config.health, run.engines
    step = engines.global_step + 1
    for engine in engines.due(step):
        engine.largest_norm = math.inf
        if settings.spike == "skip":
            engine.largest_norm = engines.spikes.largest_norm(step, engine.name)
    run.kept_step = KeptStep(engines, terms) if settings.blame else None
    return batches if run.kept_step is None else run.kept_step.keep(batches)


def find_spikes(run: RecoveringRun, numbers: StepNumbers) -> dict[str, Any]:
    """Looks for spikes in a step's metrics. Each engine's spikes so far, under their log names.

    They are told of at once, as a checkpoint of this step may follow: a resume from it does not
    tell of them again. Those that a rollback is to follow are in it.
    """
    step, engines, counts = numbers.local["step"], run.engines, {}
    for engine in engines.due(step):
        names = engines.label(engine, {"loss": 0.0, "grad_norm": 0.0})
        loss, norm = (numbers.means.get(name, math.nan) for name in names)
        spans = run.batches.spans(engines.global_step - step)
        count = engines.spikes.add(step, engine.name, loss, norm, spans)
        counts |= engines.label(engine, {"spikes": count})
    if run.live.config.health.spike != "rollback":
        tell_spikes(run)
    return counts


def tell_spikes(run: RecoveringRun) -> None:
    """Tells of the spikes that were found and that nothing else follows."""
    for spike in run.engines.spikes.take():
        if text := run.spike_warnings.text(spike, monotonic()):
            log_warning("%s", text)
        else:
            log.debug("%s", spike)


def recover(run: RecoveringRun) -> bool:
    """Does what `[health]` says to the step that was just taken. True if the run has returned to an
    earlier one.

    Raises NonFiniteError, on all ranks, if the run ends: `rescue` then saves what it has, which the
    skipped steps have not changed.
    """
    settings, step = run.live.config.health, run.engines.global_step
    if settings.spike == "rollback" and (spikes := run.engines.spikes.take()):
        _roll_back(run, spikes[0].step, str(spikes[0]), spikes[0].spans)
        return True
    tell_spikes(run)  # of a checkpoint of a run that was to roll back
    skips = [skip for skip in run.engines.skips.of(step) if skip.reason != "overflow"]
    nonfinite = [skip for skip in skips if skip.reason == "nonfinite"]
    for skip in nonfinite:
        _blame(run, skip)
    if nonfinite and settings.nonfinite == "stop":
        _stop(run, _described(nonfinite[0]), "health.nonfinite = 'stop'")
    if nonfinite and settings.nonfinite == "rollback":
        _roll_back(run, step, _described(nonfinite[0]), run.batches.spans(0))
        return True
    if too_many := [skip for skip in skips if skip.in_a_row >= settings.most_skipped]:
        _stop(run, _described(too_many[0]), f"health.most_skipped = {settings.most_skipped}")
    return False


def exit_code(run: RecoveringRun) -> int:
    """Of a run that has ended: 0, or 128 + the number of the signal that ended it.

    Raises NonFiniteError, on all ranks, if an engine's last steps were skipped: the launcher must
    not take such a run for a complete one.
    """
    if isinstance(run.ending, Interrupt):
        return 128 + run.ending.signal
    if run.finishing and run.ending is None:
        tell_spikes(run)  # a rollback follows them if the run is extended, and not yet
    for engine in run.engines.trained:
        if count := engine.counters.skipped_in_a_row:
            steps = f"its last {count} steps were" if count > 1 else "its last step was"
            _raise(f"the run has ended, but engine {engine.name!r} does not train: {steps} skipped")
    return 0


def _described(skip: Skip) -> str:
    count = f", the last {skip.in_a_row} steps in a row" if skip.in_a_row > 1 else ""
    return f"step {skip.step}: engine {skip.engine!r}: skipped, as {WHAT[skip.reason]}{count}"


def _blame(run: RecoveringRun, skip: Skip) -> None:
    """Logs and records where a step that was just skipped began, if it was kept. Collective."""
    if run.kept_step is None:
        return
    found = run.kept_step.blame(skip.engine)
    spans = run.batches.spans(0)
    for rank, number, text in found:
        samples = run.batches.samples_in(spans, rank, number)
        whose = f" (samples {_listed(samples)})" if samples else ""
        what = f"rank {rank}, micro-batch {number}{whose}: the first not to be finite is {text}"
        run.bus.record("health", f"blame {skip.engine}", skip.step, what)
    if not found:
        what = "run again, all its outputs and gradients are finite"
        run.bus.record("health", f"blame {skip.engine}", skip.step, what)


def _roll_back(run: RecoveringRun, step: int, reason: str, spans: Sequence[Span]) -> None:
    """Returns to the last good checkpoint before `step`, and drops its samples, those in `spans`.
    Collective.

    As a resume from there, also of live changes and events. Later checkpoints are removed, unless
    they are pinned: a resume must not continue from them.
    """
    most = run.live.config.health.max_rollbacks
    if run.engines.rollbacks >= most:
        _stop(run, reason, f"health.max_rollbacks = {most}")
    run.finish_save(run.saver.wait())
    run.drain()
    directory = _last_good(run, step)
    if directory is None:
        _stop(run, reason, "there is no good checkpoint before it to return to")
    samples = run.batches.samples_in(spans)
    dropped, rollbacks = [*run.batches.dropped, *spans], run.engines.rollbacks + 1
    changes = _changes(run)
    log_warning("%s: returning to %s", reason, directory)
    restore(directory, run.engines, run.batches, run.live, run.callbacks)
    run.callbacks.forget()
    run.batches.drop(dropped)
    run.engines.rollbacks = rollbacks
    run.saver.forget_after(directory)
    _show_earlier_step(run)
    run.returned()
    for text in changes:
        if text not in _changes(run):
            log_warning("dropping the live change %s: it was made after that checkpoint", text)
    what = _listed(samples) if samples else f"of each rank, (epoch, from, to): {_listed(spans)}"
    run.bus.record(
        *("health", "rollback", step),
        f"returned to step {run.engines.global_step} ({rollbacks} of {most} rollbacks); step "
        f"{step}'s samples are dropped: {what}",
    )


def _last_good(run: RecoveringRun, before: int) -> Path | None:
    return last_good(run.saver.directory, run.saver.disks, before, run.saver.passed_over)


def _show_earlier_step(run: RecoveringRun) -> None:
    """Drops the metrics of the steps that are taken again."""
    step, config = run.engines.global_step, run.live.config
    with distributed.raise_on_all_ranks(f"run directory {config.run_dir}"):
        run.recorder.event(step, "rollback", f"returned to step {step}")
    run.status.restart(step, config.run.steps)
    run.progress.set_steps(config.run.steps)


def _listed(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))


def _changes(run: RecoveringRun) -> list[str]:
    return [*run.engines.describe_overrides(), *run.live.changes()]


def _stop(run: RecoveringRun, reason: str, key: str) -> NoReturn:
    run.saver.note = f"saved as the run ended: {reason}"
    _raise(f"{reason} ({key})")


def _raise(text: str) -> NoReturn:
    error = NonFiniteError(text)
    error.on_all_ranks = True
    raise error
