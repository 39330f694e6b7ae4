"""The loop: steps, and between them commands, reports, evaluations, saves and exports."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from harness import distributed
from harness.checkpoint.export import export
from harness.checkpoint.save import Saver
from harness.config import Config
from harness.control.bus import Bus
from harness.control.commands import Command, Eval, Export, Quit, Save, SetLr
from harness.data import Batches
from harness.engines import Engines
from harness.errors import CheckpointError
from harness.evaluate import evaluate
from harness.metrics.meters import StepMeter, StepNumbers
from harness.metrics.progress import Progress
from harness.metrics.sinks import Sink
from harness.task import Task
from harness.utils import to_device

log = logging.getLogger(__name__)
tell = distributed.global_leader_only(log.error)


class Trainer:
    """Drives the engines over the batches. Every rank runs the same loop, step by step."""

    def __init__(
        self,
        config: Config,
        task: Task,
        engines: Engines,
        batches: Batches,
        saver: Saver,
        bus: Bus,
        sinks: Sequence[Sink],
        progress: Progress,
    ):
        self.config = config
        self.task = task
        self.engines = engines
        self.batches = batches
        self.saver = saver
        self.bus = bus
        self.sinks = sinks
        self.progress = progress
        self.meter = StepMeter()
        self.quitting = False
        self.finishing = False
        self._saved_step: int | None = None
        self._evaluation: dict[str, float] = {}  # at this step, if there was one

    def run(self) -> None:
        """Trains up to `run.steps`, or to a `quit`; then evaluates, exports and saves."""
        if self.engines.global_step >= self.config.run.steps:
            log.info("the run is complete; a larger run.steps lets it go on")
            return
        self.engines.train()
        if self.config.trainer.eval_every and self.engines.global_step == 0:
            self.evaluate()  # where it starts from; and a broken evaluation is known now
        while not self.quitting and self.engines.global_step < self.config.run.steps:
            self.step()
            self.mind_saves(self.saver.poll)
            if self.is_due(self.config.trainer.eval_every):
                self.evaluate()
            for command in self.bus.poll():
                self.obey(command)
            if self.is_due(self.config.trainer.save_every):
                self.save()
            if self.is_due(self.config.trainer.export_every):
                self.export()
        self.finish()

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
        reports.append(self.engines.norms())
        local = {
            "step": self.engines.global_step,
            "epoch": self.batches.epoch,
            **self.engines.rates(),
            "step_time_s": time.perf_counter() - started,
        }
        self.report(self.meter.push(local, reports, samples, tokens))

    def obey(self, command: Command) -> None:
        """Applies one command, between two steps."""
        log.info("step %d: %s", self.engines.global_step, command)
        match command:
            case Save(name):
                self.save(name)
            case Export():
                self.export()
            case Eval():
                self.evaluate()
            case Quit():
                self.quitting = True
            case SetLr(lr):
                self.engines.set_lr(lr)
                self._saved_step = None  # a checkpoint of this step would not hold it yet

    def is_due(self, every: int) -> bool:
        """Whether this step is a multiple of `every`; at the run's end `finish` sees to it."""
        step = self.engines.global_step
        is_end = self.quitting or step == self.config.run.steps
        return bool(every) and step % every == 0 and not is_end

    def finish(self) -> None:
        """What is due when the run ends or is told to quit.

        The checkpoint comes last: a run that resumes from it finds nothing left to do.
        """
        self.mind_saves(self.saver.wait)
        self.finishing = True
        if self.engines.global_step == self.config.run.steps:
            self.evaluate()
        if self.config.trainer.export_on_quit:
            self.export()
        if self.config.trainer.save_on_quit:
            self.save()
        self.mind_saves(self.saver.wait)
        self.report(self.meter.drain())
        self.bus.close()

    def save(self, name: str | None = None) -> None:
        """Writes a checkpoint of this step, unless it stands already without a name."""
        if self._saved_step == self.engines.global_step and name is None:
            return
        self.mind_saves(self.saver.wait)  # the one before, whose failure is not this one's
        self.report(self.meter.drain())  # the counters must hold this step
        self._saved_step = self.engines.global_step
        self.mind_saves(lambda: self.saver.save(self._evaluation, name))

    def mind_saves(self, action: Callable[[], None]) -> None:
        """Does something with the saver. A failure is told, and ends the run only if so wished,
        or if it was the last chance."""
        try:
            action()
        except CheckpointError as error:
            self._saved_step = None
            if self.finishing or self.config.checkpoint.on_error == "stop":
                raise
            tell("%s; the run goes on, and the next save tries again", error)

    def export(self) -> None:
        """Writes the plain weights of this step."""
        export(self.engines, self.config.run_dir / "exports")

    def evaluate(self) -> None:
        """Evaluates on the held-out data, and records the result as `eval/...`."""
        if self.task.eval_data is None:
            return
        self.report(self.meter.drain())
        found = evaluate(self.engines, self.task, self.config.data.micro_batch_size)
        step = self.engines.global_step
        log.info("step %d: eval %s", step, " ".join(f"{k} {v:.4f}" for k, v in found.items()))
        self._evaluation = {f"eval/{name}": value for name, value in found.items()}
        self.record({"step": step, "epoch": self.batches.epoch} | self._evaluation)

    def report(self, done: Sequence[StepNumbers]) -> None:
        """Counts finished steps, and on rank 0 records and shows them."""
        for numbers in done:
            self.engines.count(numbers.samples, numbers.tokens)
            counters = self.engines.trained[0].counters
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

    def record(self, record: Mapping[str, Any]) -> None:
        """Gives a record to every sink."""
        for sink in self.sinks:
            sink.write(record)
