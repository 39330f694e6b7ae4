"""The directory of a run, `runs/NAME/`: its lock, its log, its resolved config."""

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, Self

from harness import distributed
from harness.checkpoint.disks import find_disks
from harness.checkpoint.retention import clean
from harness.config import Config
from harness.distributed.failures import raise_lost_rank
from harness.engine.models import engine_settings
from harness.errors import HarnessError, is_on_all_ranks, summary, with_notes
from harness.files import json_write, locked, toml_write
from harness.health import outcome, phases, watchdog
from harness.health.outcome import Outcome
from harness.logs import log_to_file
from harness.provenance import record_start

log = logging.getLogger(__name__)


class RunDirectory:
    """One run directory, the same path on every rank, possibly on several disks. A context.

    Entering the context locks an earlier run's directory before anything is read from it, and opens
    its log, so that it records why the run cannot be resumed. A new directory is made by `create`,
    once everything else has been validated. On an error, `log.txt` and `ended.json` record why the
    run ended.
    """

    def __init__(self, config: Config):
        """Collective. Raises HarnessError, on all ranks, if the path cannot be accessed."""
        self.path = config.run_dir
        self.checkpoints = self.path / "checkpoints"
        self.exports = self.path / "exports"
        self._config = config
        self._stack = ExitStack()
        self.disks = find_disks(self.checkpoints)
        if self.disks.count > 1:
            log.info(
                "%s is on %d disks: each has the files of its ranks", self.path, self.disks.count
            )
        with distributed.raise_on_all_ranks(f"run directory {self.path}"):
            self._existed = self.path.exists()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._stack = stack
            self._lock_and_log(self._existed)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        return self._stack.__exit__(kind, error, trace)

    def create(self) -> None:
        """Makes the directory if it is new; removes half-written exports. Collective.

        Raises HarnessError, on all ranks, if another run uses it, or it cannot be written.
        """
        self._lock_and_log(not self._existed)
        with distributed.raise_on_all_ranks(f"exports in {self.exports}"):
            if self.disks.is_leader:
                clean(self.exports)

    def record_start(self, step: int) -> None:
        """Writes, on rank 0, what the run is started from: the resolved config, DeepSpeed's JSON of
        each engine, and a line of starts.jsonl. Collective. Raises HarnessError on all ranks."""
        with distributed.raise_on_all_ranks(f"run directory {self.path}"):
            if distributed.is_global_leader():
                write_config(self._config)
                write_deepspeed(self._config)
                record_start(self._config, step)

    def _lock_and_log(self, now: bool) -> None:
        """If `now`, locks the directory, once on each disk, and opens its log. Collective."""
        with distributed.raise_on_all_ranks(f"run directory {self.path}"):
            if now and self.disks.is_leader:
                self._stack.enter_context(locked(self.path / "control/lock"))
                outcome.forget(self.path)
        with distributed.raise_on_all_ranks(f"log of run directory {self.path}"):
            if now:
                handler = log_to_file(self.path / "log.txt")
                outcome.write_into(self.path)
                watchdog.write_into(self.path, self.disks.is_leader)
                self._stack.callback(outcome.write_into, None)
                self._stack.callback(handler.close)
                self._stack.callback(logging.getLogger("harness").removeHandler, handler)
                self._stack.enter_context(_errors_logged_by(handler, self.disks.is_leader))
                self._stack.enter_context(raise_lost_rank(self._config.run.timeout_s))


@contextmanager
def _errors_logged_by(handler: logging.Handler, is_leader: bool) -> Iterator[None]:
    """Logs to log.txt why the run ended: the terminal's output may be lost with a node.

    What is raised on all ranks, once: if this one `is_leader` of those that share the file.
    """
    try:
        yield
    except Exception as error:
        Outcome.of(error).write()
        phases.enter("end")
        if is_leader or not is_on_all_ranks(error):
            is_ours = isinstance(error, HarnessError)
            text, trace = (with_notes(error), None) if is_ours else (summary(error), sys.exc_info())
            handler.handle(log.makeRecord(log.name, logging.ERROR, "", 0, text, (), trace))
        raise


def write_deepspeed(config: Config) -> None:
    """Writes DeepSpeed's JSON of each engine, as it is given to DeepSpeed, to deepspeed/NAME.json,
    which can be a `ds_config`."""
    directory = config.run_dir / "deepspeed"
    directory.mkdir(exist_ok=True)
    for name, engine in config.engines.items():
        settings = engine_settings(engine, config.data.micro_batch_size)
        json_write(settings, directory / f"{name}.json")


def write_config(config: Config) -> None:
    """Writes the resolved config into the run directory, where `--config` can read it."""
    plain = config.model_dump()
    tables: dict[str, Any] = {k: v for k, v in plain.items() if k != "engines"}
    tables |= {f"engines.{name}": engine for name, engine in plain["engines"].items()}
    toml_write(tables, config.run_dir / "config.toml")
