"""The training loop: steps, and between them commands, metrics, evaluations, saves, exports."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import distributed
from harness.callbacks.moments import Callbacks
from harness.checkpoint.export import export
from harness.checkpoint.save import Saver, SaveResult
from harness.command_queue import CommandQueue
from harness.control.bus import Bus, Ticket
from harness.control.commands import EvalQuit, Interrupt, Quit, QuitUnsaved, Save, StateChange
from harness.control.live import LiveConfig
from harness.data.step_batches import StepBatches
from harness.distributed import StepVector
from harness.distributed.failures import current, raise_lost_rank, raise_together
from harness.engine.blame import KeptStep
from harness.engine.engines import Engines
from harness.errors import CheckpointError, GradientError, HarnessError, no_exit
from harness.evaluate import check_best_metric, evaluate
from harness.execute import execute
from harness.health.spikes import SpikeWarnings
from harness.health.stragglers import Pace
from harness.metrics.flops import FlopMeter
from harness.metrics.meters import StepMeter, StepNumbers
from harness.metrics.progress import Progress
from harness.metrics.recorder import Recorder
from harness.metrics.status import Status
from harness.metrics.trace import Traces
from harness.recovery import begin_step, exit_code, find_spikes, prepare, recover
from harness.rescue import BegunStep, rescue
from harness.run_view import RunView
from harness.task import Task
from harness.utils import to_device

log = logging.getLogger(__name__)
log_error = distributed.global_leader_only(log.error)


class Trainer:
    """Runs the engines over the batches. Every rank runs the same loop in lockstep."""

    def __init__(
        self,
        live: LiveConfig,
        task: Task,
        engines: Engines,
        batches: StepBatches,
        saver: Saver,
        bus: Bus,
        recorder: Recorder,
        callbacks: Callbacks,
        progress: Progress,
        status: Status,
    ):
        self.live = live
        self.task = task
        self.engines = engines
        self.batches = batches
        self.saver = saver
        self.bus = bus
        self.recorder = recorder
        self.callbacks = callbacks
        callbacks.run = RunView(self)
        self.progress = progress
        self.status = status
        self.meter = StepMeter()
        self.flops = FlopMeter(bool(live.config.optimizations.compile))
        self.traces = Traces(bus, live.config.run_dir / "traces")
        self.vector = StepVector()
        self.pace = Pace(status.note)
        for part in (bus, self.meter, batches, engines.gradient_check, engines.skips):
            self.vector.add(part)
        if callbacks.is_used:
            self.vector.add(callbacks)
        self.evaluated: set[str] = set()  # metrics of the evaluations so far
        self.paused = False
        self.ending: Quit | None = None
        """The command that ends the run before its last step."""
        self.ending_reason = ""
        """Why a callback ends it."""
        self.finishing = False
        self.commands = CommandQueue(self)
        self._saving: list[Ticket] = []
        """Commands that wait for the save in flight."""
        self.failures = current()
        self.begun: BegunStep | None = None  # the step in progress
        self.kept_step: KeptStep | None = None  # the last one, with `health.blame`
        self.spike_warnings = SpikeWarnings()
        self._started_at = None if saver.begins_in_memory else engines.global_step
        self._saved_step: int | None = None
        self._exported_step: int | None = None
        self._evaluation: dict[str, float] = {}  # at this step, if there was one

    def train(self) -> int:
        """Trains up to `run.steps`, or to a `quit`; then evaluates, exports and saves. Returns the
        `exit_code`."""
        if self.is_over() and self.engines.finished_at == self.engines.global_step:
            log.info("the run is complete; a larger run.steps in the config continues it")
            self.finish_copies()  # in a store that was down at the end
            return exit_code(self)
        try:
            with raise_lost_rank(self.failures.timeout_s), no_exit(), self.engines.explained():
                self.loop()
                self.finish()
                self.tell("on_end")
        except Exception as error:
            rescue(self, error)
            raise
        return exit_code(self)

    def loop(self) -> None:
        """Steps, and what is due between them, until the run is over."""
        self.engines.train()
        self.begin()
        self.batches.check_ranks()
        self.tell("on_start")
        every = self.live.config.trainer.eval_every
        if (every and self.engines.global_step == 0) or self.engines.await_evaluation(every):
            self.evaluate()  # the starting point; and a broken evaluation fails now
        prepare(self)
        self.commands.handle()
        while not self.is_over():
            self.step()
            if recover(self):
                continue
            self.commands.add(self.callbacks.steps(self.engines.global_step), "callback")
            self.finish_save(self.saver.poll())
            if self.is_due(self.live.config.trainer.eval_every):
                self.evaluate()
            self.commands.handle()
            if self.is_due(self.live.config.trainer.save_every):
                self.save()
            if self.is_due(self.live.config.checkpoint.in_memory_every):
                self.save_in_memory()
            if self.is_due(self.live.config.trainer.export_every):
                self.try_to_export()

    def begin(self) -> None:
        """The first exchange, of an epoch that all ranks begin together, too. Blocks for the
        weights of the first step, if micro-batches are weighed."""
        step, size = self.engines.global_step, self.engines.gradient_accumulation
        self.batches.prefetch(step + 1, size)
        self.batches.prefetch(step + 2, size)
        self.vector.exchange()
        if self.batches.is_weighed:
            self.vector.wait()

    def step(self) -> None:
        """One step: all its micro-batches, through every engine."""
        if self.batches.begin_epoch():
            self.begin()
        self.meter.begin()
        self.begun = BegunStep(self.engines)
        due = self.engines.due(self.engines.global_step + 1)
        samples, tokens, size = 0, 0, self.engines.gradient_accumulation
        batches, terms = self.batches.next_step(size)
        batches = begin_step(self, batches, terms)
        self.engines.sync_buffers()
        for number, batch in enumerate(batches):
            is_padding = terms is not None and terms.is_padding[number]
            counted = (0, 0) if is_padding else self.task.count(batch)
            samples, tokens = samples + counted[0], tokens + counted[1]
            with self.flops.counting(due, *counted):
                report = self.engines.step(to_device(batch, distributed.device()), terms, number)
            self.meter.add(report, terms.own[number] if terms else 1.0)
        self.engines.end_step()
        self.begun, self._evaluation = None, {}
        self.batches.end_step()
        self.meter.add(self.engines.step_metrics())
        local: dict[str, Any] = {"step": self.engines.global_step, "epoch": self.batches.epoch}
        local |= {**self.batches.metrics(), **self.engines.rates()}
        try:
            self.batches.prefetch(self.engines.global_step + 2, size)
        finally:  # if it fails, this step is over all the same
            self.meter.push(local, [engine.name for engine in due], samples, tokens)
        self.vector.exchange()
        self.report(self.meter.take())
        self.status.stepped(self.engines.global_step)
        self.traces.end(self.engines.global_step)

    @property
    def is_saved(self) -> bool:
        """Whether this step has a checkpoint on a disk, or is where the run started from one."""
        return self.engines.global_step in (self._saved_step, self._started_at)

    def is_over(self) -> bool:
        """Whether no further step is to be taken."""
        return self.ending is not None or self.engines.global_step >= self.live.config.run.steps

    def is_due(self, every: int) -> bool:
        """Whether this step is a multiple of `every`; at the run's end `finish` takes over."""
        return bool(every) and self.engines.global_step % every == 0 and not self.is_over()

    def tell(self, moment: str, *args: Any) -> None:
        """Calls the callbacks. What they command is executed with the next commands; at the run's
        end it is ignored."""
        commands = self.callbacks.moment(moment, *args)
        if not self.finishing:
            self.commands.add(commands, "callback")

    def has_changed(self) -> None:
        """The run's state has, since this step was saved."""
        self._saved_step = None

    def returned(self) -> None:
        """Continues after an earlier step, which has been restored from its checkpoint."""
        self._saved_step, self._evaluation = self.engines.global_step, {}
        self._exported_step = None
        self.begin()

    def execute(self, ticket: Ticket) -> None:
        """Executes a command on all ranks; one that fails on any of them has failed on all, and the
        run continues, unless it is a save whose failure ends the run, or others wait in it."""
        step = self.engines.global_step
        log.info("step %d: %s: %s", step, ticket.front, ticket.text)
        try:
            with raise_together(f"{ticket.text!r}"):
                if isinstance(ticket.command, Save):
                    result = self.save(ticket.command.name, ticket)
                else:
                    result = execute(self, ticket)
        except HarnessError as error:
            self.bus.end(ticket, "failed", step, str(error))
            is_fatal = isinstance(error, CheckpointError) and self.save_failure_is_fatal()
            if is_fatal or isinstance(error, GradientError):
                raise
        else:
            if result is not None:
                self.bus.end(ticket, "done", step, result)
                self.recorder.event(step, "command", f"{ticket.text}: {result}")
        if isinstance(ticket.command, StateChange):
            self.has_changed()  # a checkpoint of this step would not contain it
            self._exported_step = None

    # Between steps

    def finish(self) -> None:
        """Evaluates, exports and saves at the end of the run or after `quit`.

        The checkpoint comes last: a run that resumes from it has nothing left to do, unless a
        command or an error has ended this one at its last step.
        """
        self.traces.end(self.engines.global_step, immediately=True)
        self.finish_save(self.saver.wait())
        self.finishing = True
        if self.ending is None or isinstance(self.ending, EvalQuit):
            self.evaluate()
            self.commands.execute_all()
        settings = self.live.config.trainer
        is_exported = self._exported_step == self.engines.global_step
        wanted = settings.export_at_end and not isinstance(self.ending, QuitUnsaved | Interrupt)
        if wanted and not is_exported:
            self.export()
        if self.ending is None:
            self.engines.finished_at = self.engines.global_step
            self.has_changed()  # a checkpoint of this step would not contain it
        if isinstance(self.ending, Interrupt) or (
            settings.save_at_end and not isinstance(self.ending, QuitUnsaved)
        ):
            self.save()
        self.finish_save(self.saver.wait())
        self.drain()
        self.callbacks.last_steps(self.engines.global_step)
        self.finish_copies()
        for engine in self.engines.trained:
            engine.log_offload_stats()

    def finish_copies(self) -> None:
        """Waits until all checkpoints are copied, or a command ends the waiting."""
        with self.status.doing("upload"):
            self.saver.finish_copies(self.commands.poll)

    def save(self, name: str | None = None, ticket: Ticket | None = None) -> str | None:
        """Writes a checkpoint of this step, unless one exists and there is no `name` to pin it.

        Returns the answer to `ticket`, the command that requested it; None if `finish_save` answers
        it later. Raises CheckpointError, on all ranks, if the save of a command fails, and else as
        `finish_save` does.
        """
        if self._saved_step == self.engines.global_step and name is None:
            if ticket is None or not self.saver.is_writing:
                return "already saved"
            self._saving.append(ticket)
            return None
        self.finish_save(self.saver.wait())
        with self.status.doing("save"):
            self.drain()  # the counters must include this step
            result = self.saver.save(self._evaluation, name)
        if result is not None and result.error is not None and ticket is not None:
            raise result.error
        self._saved_step = self.engines.global_step
        if result is None and ticket is not None:
            self._saving.append(ticket)
        self.finish_save(result)
        return None if result is None else f"saved {result.path}"

    def save_in_memory(self) -> None:
        """Keeps this step in host memory. Collective."""
        with self.status.doing("save"):
            self.drain()  # the counters must include this step
            self.saver.save_in_memory()

    def finish_save(self, result: SaveResult | None) -> None:
        """Answers the commands that wait for a save, once it has ended. `result`: None if not yet.

        A failure is logged if no command waits for the save; the next save tries again. Raises its
        CheckpointError, on all ranks, if `save_failure_is_fatal`.
        """
        if result is None:
            return
        error = result.error
        tickets, self._saving = self._saving, []
        for ticket in tickets:
            state, text = ("failed", str(error)) if error else ("done", f"saved {result.path}")
            self.bus.end(ticket, state, self.engines.global_step, text)
        if error is None:
            self.recorder.event(self.engines.global_step, "save", result.path)
            self.tell("on_save", result.path)
            return
        self._saved_step = None
        if self.save_failure_is_fatal():
            raise error
        if not tickets:
            log_error("%s; the run continues, and the next save tries again", error)

    def save_failure_is_fatal(self) -> bool:
        """Whether a save that fails ends the run: at its end no other one follows."""
        return self.finishing or self.live.config.checkpoint.on_error == "stop"

    def export(self, format: str = "sft") -> Path:
        """Writes the plain weights of this step. Returns their directory."""
        directory = self.live.config.run_dir / "exports"
        with self.status.doing("export"):
            self.drain()  # raises if this step has made the weights wrong
            path = export(self.engines, directory, format, self.commands.poll)
        self._exported_step = self.engines.global_step if format == "sft" else None
        self.recorder.event(self.engines.global_step, "export", path)
        self.tell("on_export", path)
        return path

    def try_to_export(self) -> None:
        """Exports; a failure that is raised on all ranks is logged, and the run continues."""
        try:
            self.export()
        except HarnessError as error:
            if not error.on_all_ranks or isinstance(error, GradientError):
                raise
            log_error("%s; the run continues, and the next export tries again", error)

    def evaluate(self) -> str | None:
        """Evaluates on the held-out data, and records the result as `eval/...`. Returns it as text.

        None if there is no such data, or a `quit` was received meanwhile.
        """
        if self.task.eval_data is None:
            return None
        self.drain()
        with self.status.doing("evaluation"):
            found = evaluate(self.engines, self.task, self.live.config, self.commands.poll)
        if found is None:
            return None
        step = self.engines.global_step
        text = " ".join(f"{name} {value:.4f}" for name, value in found.items())
        log.info("step %d: %s", step, text)
        self._evaluation = found
        record = {"step": step, "time": time.time(), "epoch": self.batches.epoch} | found
        self.recorder.write(record)
        self.evaluated.update(found)
        with distributed.raise_on_all_ranks("evaluation"):
            check_best_metric(self.live.config, self.task, self.evaluated)
        if self.engines.evaluated(found, self.live.config.trainer.eval_every):
            self.has_changed()  # a checkpoint of this step would not contain it
        self.tell("on_eval", record)
        return text

    def drain(self) -> None:
        """Completes the vectors of all steps taken, and reports them. Blocks."""
        self.vector.drain()
        self.report(self.meter.take())

    def report(self, done: Sequence[StepNumbers]) -> None:
        """Adds finished steps to the counters, and on rank 0 records and shows them."""
        for numbers in done:
            self.engines.count(numbers.local["step"], numbers.samples, numbers.tokens)
            counters = max((e.counters for e in self.engines.trained), key=lambda c: c.samples)
            self.pace.judge(numbers.local["step"], numbers.times)
            record = numbers.local | numbers.means | find_spikes(self, numbers)
            record |= {"samples": counters.samples, "tokens": counters.tokens}
            record |= numbers.speed(record["step_time_s"])
            due = self.engines.due(numbers.local["step"])
            record |= self.flops.utilization(due, numbers, record["step_time_s"])
            self.recorder.write(record)
            self.callbacks.note(record)
            self.progress.show(record)
            self.status.show(record)
