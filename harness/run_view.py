"""What a callback sees of a run, and how it acts on it."""

import logging
from typing import Protocol

from harness import distributed
from harness.callbacks.moments import Callbacks
from harness.config import Config
from harness.control.live import LiveConfig
from harness.engine.engines import Engines

log = logging.getLogger(__name__)
log_on_leader = distributed.global_leader_only(log.info)


class ViewedRun(Protocol):
    """What is seen: a `trainer.Trainer`."""

    live: LiveConfig
    engines: Engines
    callbacks: Callbacks
    ending_reason: str


class RunView:
    """A run, as its callbacks see it: `callbacks.CallbackRun`."""

    def __init__(self, run: ViewedRun):
        self._run = run

    @property
    def step(self) -> int:
        """The last step taken."""
        return self._run.engines.global_step

    @property
    def config(self) -> Config:
        """The config, with the changes of live commands."""
        return self._run.live.config

    @property
    def engines(self) -> Engines:
        """The engines by name."""
        return self._run.engines

    @property
    def is_leader(self) -> bool:
        """Whether this is rank 0."""
        return distributed.is_global_leader()

    def command(self, text: str) -> None:
        """Has a live command executed on all ranks, if this is rank 0."""
        self._run.callbacks.add_command(text)

    def stop(self, reason: str) -> None:
        """Ends the run, as the command `quit` does."""
        log_on_leader("step %d: the run is to end: %s", self.step, reason)
        self._run.ending_reason = reason
        self.command("quit")
