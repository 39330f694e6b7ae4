"""Where the records of a run go: its sinks."""

import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from harness.config import Config
from harness.errors import HarnessError, TaskError
from harness.metrics.sinks import EVENT, Sink

log = logging.getLogger(__name__)


class Recorder:
    """The sinks of a run, on rank 0; other ranks have none."""

    def __init__(self, sinks: Sequence[Sink] = ()):
        self._sinks = sinks

    def write(self, record: Mapping[str, Any]) -> None:
        """The metrics of a step, or of an evaluation, to every sink."""
        for sink in self._sinks:
            sink.write(record)

    def event(self, step: int, event: str, text: object) -> None:
        """That something happened after a step, to every sink."""
        self.write({"step": step, EVENT: event, "text": str(text)})


def open_task_sink(sink: Any, config: Config, fail: Callable[[HarnessError], None]) -> "TaskSink":
    """A sink of the task's: itself, or what a function or a class of sinks returns. `fail` is told
    of its errors. Raises TaskError, which names it, if it cannot be opened."""
    if not isinstance(sink, type) and isinstance(sink, Sink):
        return TaskSink(sink, fail)
    try:
        return TaskSink(sink(config), fail)
    except HarnessError:
        raise
    except Exception as error:
        name = getattr(sink, "__name__", type(sink).__name__)
        raise TaskError(f"sink {name}, at the start:\n{traceback.format_exc()}") from error


class TaskSink:
    """A sink of the task's, whose errors are not rank 0's alone: they end the run on all ranks."""

    def __init__(self, sink: Sink, fail: Callable[[HarnessError], None]):
        """`fail` is told of an error."""
        self._sink, self._fail = sink, fail

    def write(self, record: Mapping[str, Any]) -> None:
        """A record; after an error none."""
        try:
            self._sink.write(record)
        except Exception as error:
            self._fail(self._error(f"step {record['step']}", error))

    def close(self) -> None:
        """Closes the sink. Raises TaskError."""
        try:
            self._sink.close()
        except Exception as error:
            raise self._error("close", error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        """Closes the sink; after an error its own is only logged."""
        try:
            self.close()
        except TaskError as failure:
            if error[1] is None:
                raise
            log.error("%s", failure)

    def _error(self, where: str, error: Exception) -> TaskError:
        name = type(self._sink).__name__
        return TaskError(f"sink {name}, {where}: {type(error).__name__}: {error}")
