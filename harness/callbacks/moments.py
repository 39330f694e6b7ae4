"""Calls the callbacks of a run, the same on every rank."""

import logging
import traceback
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from harness import distributed
from harness.callbacks.callback import Callback, CallbackRun
from harness.distributed.failures import raise_together
from harness.distributed.rng import rng_state, set_rng_state
from harness.errors import CheckpointError, HarnessError, TaskError
from harness.utils import check_state

log = logging.getLogger(__name__)
log_warning = distributed.global_leader_only(log.warning)

STEPS_TO_AGREE = 2
"""After which commands of `on_step` are executed, and errors raised: as the step's vector takes."""


class Callbacks:
    """The callbacks of a run, in order; a part of the step's vector.

    All moments but `on_step` are rare, and collective: an error on any rank is raised on all, and
    rank 0's commands are broadcast. What `on_step` leads to travels in the step's vector.
    """

    def __init__(self, callbacks: Sequence[Callback], has_sinks: bool = False):
        """`has_sinks`: the task has sinks, whose errors are agreed as well."""
        self._callbacks = list(callbacks)
        self.is_used = bool(callbacks) or has_sinks
        """Whether there is anything to agree on; the same on every rank."""
        self.run: CallbackRun
        """What they are called with; the trainer sets it."""
        self._commands: list[str] = []
        """Of this rank's callbacks; rank 0's count."""
        self._records: deque[Mapping[str, Any]] = deque()
        """Of steps, for `on_step`."""
        self._failure: HarnessError | None = None
        """Of this rank, in `on_step` or in a sink."""
        self._any_failed = False
        self._sent: deque[list[str]] = deque()  # commands on their way, on rank 0
        self._unsent: tuple[int, int] = 0, 0  # how many of them no vector has had, and their step
        self._due: deque[int] = deque()
        """The steps after which rank 0 has commands for all."""

    def add_command(self, text: str) -> None:
        """A live command, after the moment in progress."""
        self._commands.append(text)

    def fail(self, error: HarnessError) -> None:
        """This rank has failed, and all are to end."""
        self._failure = self._failure or error

    def note(self, record: Mapping[str, Any]) -> None:
        """The metrics of a step, for `on_step`."""
        if self._overriding("on_step"):
            self._records.append(record)

    def moment(self, name: str, *args: Any) -> list[str]:
        """Calls a moment other than `on_step`. Collective. Returns the commands to be executed, the
        same on every rank. Raises a callback's error on all ranks."""
        if not self._overriding(name):
            return []
        with raise_together("callbacks"):  # which may run the model, at ZeRO 3 on all ranks
            self._call(name, *args)
        commands, self._commands = self._commands, []
        return distributed.broadcast(commands)

    def steps(self, step: int) -> list[str]:
        """Calls `on_step` for the steps whose metrics have been noted. Returns the commands to be
        executed after `step`, the same on every rank; collective if there are any. Raises the error
        of a callback or sink on all ranks."""
        while self._records:
            try:
                self._call("on_step", self._records.popleft())
            except HarnessError as error:
                self.fail(error)
        if self._commands:
            self._sent.append(self._commands)
            self._unsent = self._unsent[0] + 1, step
            self._commands = []
        if self._any_failed:
            self._raise_failure()
        found: list[str] = []
        while self._due and self._due[0] <= step:
            self._due.popleft()
            own = self._sent.popleft() if distributed.is_global_leader() else []
            found += distributed.broadcast(own)
        return found

    def last_steps(self, step: int) -> None:
        """`steps` after the last step, of which no vector tells any more. Collective."""
        self.steps(step)
        if self.is_used:
            self._raise_failure()

    def _raise_failure(self) -> None:
        with distributed.raise_on_all_ranks("callbacks"):
            if self._failure is not None:
                raise self._failure

    def contribute(self) -> Sequence[float]:
        """Whether this rank has failed; how many lots of commands rank 0 has, and since when."""
        (count, step), self._unsent = self._unsent, (0, 0)
        is_leader = distributed.is_global_leader()
        return [self._failure is not None, count * is_leader, step * is_leader]

    def receive(self, sums: Sequence[float]) -> None:
        """Takes note of failures on any rank, and of commands."""
        failed, count, step = map(int, sums)
        self._any_failed |= failed > 0
        self._due.extend([step + STEPS_TO_AGREE] * count)

    def forget(self) -> None:
        """The run has returned to an earlier step: what later ones have led to is dropped."""
        self._records.clear()
        self._sent.clear()
        self._due.clear()
        self._unsent = 0, 0

    def state_dict(self) -> list[Any]:
        """The states of the callbacks, each with its class. Collective. Raises CheckpointError, on
        all ranks, if one fails, or cannot be loaded again."""
        if not self._callbacks:
            return []
        with distributed.raise_on_all_ranks("callbacks"):
            try:
                return [[type(each).__name__, self._state_of(each)] for each in self._callbacks]
            except TaskError as error:
                raise CheckpointError(str(error)) from None

    def _state_of(self, callback: Callback) -> dict[str, Any]:
        state = _called(callback, "state_dict", f"step {self.run.step}")
        check_state(state, f"callback {type(callback).__name__}: its state_dict")
        return state

    def load_state_dict(self, states: Sequence[Any]) -> None:
        """Restores them; of a callback that has been added or removed since there is none."""
        left = list(states)
        for callback in self._callbacks:
            name = type(callback).__name__
            found = next((state for state in left if state[0] == name), None)
            if found is not None:
                left.remove(found)
                _called(callback, "load_state_dict", "at the resume", found[1])
        for name, _ in left:
            log_warning("callback %s: its state is dropped, as the task has no such callback", name)

    def _overriding(self, name: str) -> list[Callback]:
        """The callbacks that do something at this moment."""
        return [
            each for each in self._callbacks if getattr(type(each), name) is not _moment_of(name)
        ]

    def _call(self, name: str, *args: Any) -> None:
        with _generators_restored():
            for callback in self._overriding(name):
                _called(callback, name, f"step {self.run.step}", self.run, *args)


def _called(callback: Callback, name: str, when: str, *args: Any) -> Any:
    """What a method returns. Raises TaskError, with its traceback, if it fails."""
    try:
        return getattr(callback, name)(*args)
    except HarnessError:
        raise
    except Exception as error:
        frames = error.__traceback__.tb_next if error.__traceback__ else None
        text = "".join(traceback.format_exception(type(error), error, frames))
        raise TaskError(f"callback {type(callback).__name__}.{name}, {when}:\n{text}") from None


def _moment_of(name: str) -> Any:
    return getattr(Callback, name)


@contextmanager
def _generators_restored() -> Iterator[None]:
    before = rng_state()
    try:
        yield
    finally:
        set_rng_state(before)
