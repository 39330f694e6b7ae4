"""The loop: steps, and between them commands, reports, evaluations, saves and exports."""

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import distributed
from harness.checkpoint.export import export
from harness.checkpoint.save import Saver
from harness.control.bus import Bus, Ticket
from harness.control.commands import Change, EvalQuit, Interrupt, Quit, QuitUnsaved
from harness.control.live import Live
from harness.data.loader import Batches
from harness.engine.engines import Engines
from harness.errors import CheckpointError, CommandError, HarnessError
from harness.evaluate import evaluate
from harness.execute import execute
from harness.metrics.meters import StepMeter, StepNumbers
from harness.metrics.progress import Progress
from harness.metrics.sinks import Sink
from harness.metrics.status import Status
from harness.metrics.trace import Trace
from harness.task import Task
from harness.utils import to_device

log = logging.getLogger(__name__)
tell = distributed.global_leader_only(log.error)

SECONDS_BETWEEN_POLLS = 0.05  # of a paused run
MOST_TRACED = 1000  # steps


class Trainer:
    """Drives the engines over the batches. Every rank runs the same loop, step by step."""

    def __init__(
        self,
        live: Live,
        task: Task,
        engines: Engines,
        batches: Batches,
        saver: Saver,
        bus: Bus,
        sinks: Sequence[Sink],
        progress: Progress,
        status: Status,
    ):
        self.live = live
        self.task = task
        self.engines = engines
        self.batches = batches
        self.saver = saver
        self.bus = bus
        self.sinks = sinks
        self.progress = progress
        self.status = status
        self.meter = StepMeter()
        self.paused = False
        self.ending: Quit | None = None
        """The command that ends the run before its last step."""
        self.finishing = False
        self._heard: deque[Ticket] = deque()
        """Commands that the ranks have agreed on, and that are still to be obeyed."""
        self._saving: list[tuple[Ticket, str]] = []
        """Commands that wait for the save in flight, and what to answer them."""
        self._tracing: list[tuple[Trace, Ticket]] = []
        self._saved_step: int | None = None
        self._evaluation: dict[str, float] = {}  # at this step, if there was one

    def train(self) -> int:
        """Trains up to `run.steps`, or to a `quit`; then evaluates, exports and saves.

        Returns the exit code: 0, or 128 + the number of the signal that ended the run.
        """
        if self.is_over():
            log.info("the run is complete; another run.steps in the config lets it go on")
            return 0
        try:
            self.loop()
            self.finish()
        except HarnessError as error:
            self.rescue(error)
            raise
        return 128 + self.ending.signal if isinstance(self.ending, Interrupt) else 0

    def loop(self) -> None:
        """Steps, and what is due between them, until the run is over."""
        self.engines.train()
        if self.live.config.trainer.eval_every and self.engines.global_step == 0:
            self.evaluate()  # where it starts from; and a broken evaluation is known now
        self.handle_commands()
        while not self.is_over():
            self.step()
            self.settle(self.saver.poll)
            if self.is_due(self.live.config.trainer.eval_every):
                self.evaluate()
            self.handle_commands()
            if self.is_due(self.live.config.trainer.save_every):
                self.mind_failure(self.save)
            if self.is_due(self.live.config.trainer.export_every):
                self.try_to_export()

    def step(self) -> None:
        """One step: all its micro-batches, through every engine."""
        started = time.perf_counter()
        reports, samples, tokens = [], 0, 0
        for _ in range(self.engines.gradient_accumulation):
            batch = next(self.batches)
            counted = self.task.count(batch)
            samples, tokens = samples + counted[0], tokens + counted[1]
            reports.append(self.engines.step(to_device(batch, distributed.device())))
        self.engines.global_step += 1
        self._evaluation = {}
        reports.append(self.engines.step_metrics())
        local = {
            "step": self.engines.global_step,
            "epoch": self.batches.epoch,
            **self.engines.rates(),
            "step_time_s": time.perf_counter() - started,
        }
        reported_by = [engine.name for engine in self.engines.due(self.engines.global_step)]
        self.report(self.meter.push(local, reported_by, reports, samples, tokens))
        self.status.stepped(self.engines.global_step)
        self.end_traces()

    def is_over(self) -> bool:
        """Whether no further step is to be taken."""
        return self.ending is not None or self.engines.global_step >= self.live.config.run.steps

    def is_due(self, every: int) -> bool:
        """Whether this step is a multiple of `every`; at the run's end `finish` sees to it."""
        return bool(every) and self.engines.global_step % every == 0 and not self.is_over()

    def move_end(self, steps: int) -> None:
        """Takes note of another `run.steps`. Raises CommandError if that step is behind."""
        if steps <= self.engines.global_step:
            raise CommandError(f"the run is at step {self.engines.global_step}; quit ends it here")
        self.engines.set_total_steps(steps)
        self.status.steps = steps
        self.progress.set_steps(steps)

    # Commands

    def handle_commands(self) -> None:
        """Obeys the events that are due and the commands that were heard; waits while paused."""
        self.poll_commands()
        self.execute_all()
        if not self.paused:
            return
        with self.status.doing("paused"):
            while self.paused and not self.is_over():
                time.sleep(SECONDS_BETWEEN_POLLS)
                self.settle(self.saver.poll)
                self.poll_commands()
                self.execute_all()

    def poll_commands(self) -> bool:
        """Hears commands, to obey them between two works. True if the one at hand should end: for
        a signal, and for a `quit` that came after it began."""
        news = self.bus.poll(self.engines.global_step)
        self._heard.extend(news)
        return any(isinstance(ticket.command, Quit) for ticket in news) or any(
            isinstance(ticket.command, Interrupt) for ticket in self._heard
        )

    def execute_all(self) -> None:
        """Obeys the events that are due and what was heard, in order.

        Once the run ends, it can only be told to end otherwise.
        """
        self.execute_events()
        while self._heard:
            ticket = self._heard.popleft()
            is_ending = self.finishing or self.ending is not None
            if not is_ending or isinstance(ticket.command, Quit):
                self.execute(ticket)
                self.execute_events()
            else:
                step = self.engines.global_step
                self.bus.end(ticket, "failed", step, "it came too late: the run ends here")

    def execute_events(self) -> None:
        """Obeys the events that are due at this step."""
        if self.finishing or self.ending is not None:
            return
        for event in self.live.events.due(self.engines.global_step):
            self._saved_step = None  # a checkpoint of this step would still hold the event
            try:
                self.execute(self.bus.ticket(event.command, f"event {event.id}"))
            except CommandError as error:
                tell("%s is dropped: %s", event, error)
                self.live.events.clear(event.id)
            if self.ending is not None:  # the others stay pending
                return

    def execute(self, ticket: Ticket) -> None:
        """Obeys a command on all ranks; what fails on any of them has failed, and the run goes on.

        A save that fails ends the run if `checkpoint.on_error` says so.
        """
        step = self.engines.global_step
        log.info("step %d: %s: %s", step, ticket.front, ticket.text)
        try:
            with distributed.raise_on_all_ranks(f"{ticket.text!r}"):
                result = execute(self, ticket)
        except HarnessError as error:
            self.bus.end(ticket, "failed", step, str(error))
            if isinstance(error, CheckpointError) and self.save_failure_is_fatal():
                raise
        else:
            if result is not None:
                self.bus.end(ticket, "done", step, result)
        if isinstance(ticket.command, Change):
            self._saved_step = None  # a checkpoint of this step would not hold it yet

    # What happens between steps

    def finish(self) -> None:
        """What is due when the run ends or is told to quit.

        The checkpoint comes last: a run that resumes from it finds nothing left to do.
        """
        self.end_traces(at_once=True)
        self.settle(self.saver.wait)
        self.finishing = True
        if self.ending is None or isinstance(self.ending, EvalQuit):
            self.evaluate()
            self.execute_all()
        settings = self.live.config.trainer
        if settings.export_on_quit and not isinstance(self.ending, QuitUnsaved | Interrupt):
            self.export()
        if isinstance(self.ending, Interrupt) or (
            settings.save_on_quit and not isinstance(self.ending, QuitUnsaved)
        ):
            self.save()
        self.settle(self.saver.wait)
        self.report(self.meter.drain())
        for engine in self.engines.trained:
            engine.log_offload_stats()
        self.bus.finish()

    def rescue(self, error: HarnessError) -> None:
        """Saves the steps since the last save before an error ends the run.

        Only where all ranks have agreed on the error, between two steps, and it is not that saving
        fails.
        """
        is_saved = self._saved_step == self.engines.global_step
        if not error.agreed or isinstance(error, CheckpointError) or is_saved:
            return
        tell("%s\nthis ends the run: saving it first", error)
        try:
            self.save()
            self.settle(self.saver.wait)
        except CheckpointError as second:
            tell("%s", second)

    def save(self, name: str | None = None, ticket: Ticket | None = None) -> str | None:
        """Writes a checkpoint of this step, unless it stands already without a name.

        Returns where it stands; None if it is still being written: `ticket`, the command that asks
        for it, is answered then. Raises CheckpointError, on all ranks.
        """
        if self._saved_step == self.engines.global_step and name is None:
            if self.saver.is_writing and ticket is not None:
                self._saving.append((ticket, "saved already"))
                return None
            return "saved already"
        where = self.saver.place(name)
        self.settle(self.saver.wait)
        with self.status.doing("saving"):
            self.report(self.meter.drain())  # the counters must hold this step
            self.saver.save(self._evaluation, name)
        self._saved_step = self.engines.global_step
        if not self.saver.is_writing:
            return f"saved {where}"
        if ticket is not None:
            self._saving.append((ticket, f"saved {where}"))
        return None

    def settle(self, action: Callable[[], None]) -> None:
        """Looks after the save in flight, and answers the commands that asked for it."""
        failure = ""
        try:
            failure = self.mind_failure(action)
        except CheckpointError as error:
            failure = str(error)
            raise
        finally:
            if not self.saver.is_writing:
                for ticket, saved in self._saving:
                    state = "failed" if failure else "done"
                    self.bus.end(ticket, state, self.engines.global_step, failure or saved)
                self._saving.clear()

    def save_failure_is_fatal(self) -> bool:
        """Whether a failing save ends the run: the config says so, or it was the last chance."""
        return self.finishing or self.live.config.checkpoint.on_error == "stop"

    def mind_failure(self, action: Callable[[], object]) -> str:
        """Does something with the saver; tells and returns a failure that does not end the run."""
        try:
            action()
        except CheckpointError as error:
            self._saved_step = None
            if self.save_failure_is_fatal():
                raise
            tell("%s; the run goes on, and the next save tries again", error)
            return str(error)
        return ""

    def export(self, format: str = "sft") -> Path:
        """Writes the plain weights of this step, and says where."""
        with self.status.doing("exporting"):
            return export(
                self.engines, self.live.config.run_dir / "exports", format, self.poll_commands
            )

    def try_to_export(self) -> None:
        """Exports; where that fails on all ranks alike, it tells so, and the run goes on."""
        try:
            self.export()
        except HarnessError as error:
            if not error.agreed:
                raise
            tell("%s; the run goes on, and the next export tries again", error)

    def evaluate(self) -> str | None:
        """Evaluates on the held-out data, records the result as `eval/...`, and says it.

        None if there are no such data, or a `quit` that was heard meanwhile has ended it.
        """
        if self.task.eval_data is None:
            return None
        self.report(self.meter.drain())
        size = self.live.config.data.micro_batch_size
        with self.status.doing("evaluating"):
            found = evaluate(self.engines, self.task, size, self.poll_commands)
        if found is None:
            return None
        step = self.engines.global_step
        text = " ".join(f"{name} {value:.4f}" for name, value in found.items())
        log.info("step %d: eval %s", step, text)
        self._evaluation = {f"eval/{name}": value for name, value in found.items()}
        self.record({"step": step, "epoch": self.batches.epoch} | self._evaluation)
        return text

    def trace(self, steps: int, ticket: Ticket) -> None:
        """Traces the next steps; `ticket`, who asks for it, is answered when that is written."""
        if self._tracing:
            raise CommandError("a trace is being recorded already")
        if steps > MOST_TRACED:
            raise CommandError(f"at most {MOST_TRACED} steps, which must fit into memory")
        directory = self.live.config.run_dir / "traces"
        self._tracing.append((Trace(directory, self.engines.global_step, steps), ticket))

    def end_traces(self, at_once: bool = False) -> None:
        """Writes a trace whose steps have been taken."""
        step = self.engines.global_step
        for trace, ticket in list(self._tracing):
            if not (at_once or trace.is_over(step)):
                continue
            self._tracing.clear()
            try:
                self.bus.end(ticket, "done", step, f"traced {trace.write(step)}")
            except HarnessError as error:
                self.bus.end(ticket, "failed", step, str(error))

    def report(self, done: Sequence[StepNumbers]) -> None:
        """Counts finished steps, and on rank 0 records and shows them."""
        for numbers in done:
            self.engines.count(numbers.local["step"], numbers.samples, numbers.tokens)
            counters = max((e.counters for e in self.engines.trained), key=lambda c: c.samples)
            record = numbers.local | numbers.means
            seconds = record.pop("step_time_s")
            record |= {
                "step_time_s": seconds,
                "samples": counters.samples,
                "tokens": counters.tokens,
                "tokens_per_s": numbers.tokens / seconds,
            }
            self.record(record)
            self.progress.show(record)
            self.status.show(record)

    def record(self, record: Mapping[str, Any]) -> None:
        """Gives a record to every sink."""
        for sink in self.sinks:
            sink.write(record)
