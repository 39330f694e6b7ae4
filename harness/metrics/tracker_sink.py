"""The sink of a tracker: a bounded queue, and a thread that sends what is in it.

A step only puts its record into the queue. A tracker that is down, slow or wrong is told of once;
what it does not take is lost to it, and is in metrics.jsonl.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.config import Config
from harness.health import phases
from harness.metrics.sinks import EVENT
from harness.metrics.trackers import TRACKERS, TrackedRun, Tracker

log = logging.getLogger(__name__)

CAPACITY = 10_000
"""Records in the queue."""
SECONDS_BETWEEN_SENDS = 1.0
"""So that the thread seldom takes the interpreter from the loop."""
SECONDS_BETWEEN_TRIES = 30.0
"""To open a run of a tracker."""
SECONDS_TO_ANSWER = 30.0
"""Of a call of a tracker, after which it is told of; the call itself may try again for longer."""
SECONDS_TO_END = 30.0
"""For what is left in the queue when the run ends."""


def open_trackers(config: Config, step: int) -> list["TrackerSink"]:
    """The sinks of `metrics.trackers`, for a run that begins at this step. Imports the libraries
    here, not on their threads: a process that is forked meanwhile would inherit a locked import."""
    settings, sinks = config.metrics, []
    run = TrackedRun(
        *(settings.project, config.run.name, step, config.model_dump(mode="json"), config.run_dir)
    )
    for name in settings.trackers:
        try:
            tracker = TRACKERS[name]()
        except Exception as error:  # whatever a broken installation raises
            log.warning(
                "metrics.trackers: %s cannot be used: %s: %s. The run goes on without it",
                *(name, type(error).__name__, error),
            )
        else:
            sinks.append(TrackerSink(name, tracker, run, settings.track_exports))
    return sinks


class TrackerSink:
    """Sends records to a tracker, which no step waits for and none fails with."""

    def __init__(self, name: str, tracker: Tracker, run: TrackedRun, sends_exports: bool = False):
        """`name`: the tracker's. `sends_exports`: as artifacts."""
        self._name, self._tracker, self._run = name, tracker, run
        self._sends_exports = sends_exports
        self._queue: deque[dict[str, Any]] = deque()
        self._lost = 0
        self._is_open = self._has_failed = self._is_slow = False
        self._called: float | None = None  # when, if a call is not answered yet
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._send_all, name=name, daemon=True)
        self._thread.start()

    def write(self, record: Mapping[str, Any]) -> None:
        """Puts a record into the queue; if it is full, the record is lost."""
        called = self._called
        is_late = called is not None and time.monotonic() > called + SECONDS_TO_ANSWER
        if is_late and not (self._is_slow or self._has_failed):
            self._is_slow = True  # what it may answer at last is told, too
            self._warn(f"it has not answered for {SECONDS_TO_ANSWER:.0f} s")
        if len(self._queue) < CAPACITY or record.get(EVENT) == "rollback":
            self._queue.append(dict(record))
        else:
            self._lost += 1
            self._tell("it does not keep up, or does not answer")

    def close(self) -> None:
        """Waits until the queue is empty, for `SECONDS_TO_END` at most. The watchdog is told that
        this rank does not hang meanwhile."""
        self._closing.set()
        end = time.monotonic() + SECONDS_TO_END
        while self._thread.is_alive() and (left := end - time.monotonic()) > 0:
            self._thread.join(min(left, 1.0))
            phases.wait_on()
        if self._thread.is_alive():
            self._tell(f"it has not ended within {SECONDS_TO_END:.0f} s")
        if lost := self._lost + len(self._queue):
            log.warning("metrics.trackers: %s has not got %d records", self._name, lost)

    def _tell(self, problem: object) -> None:
        if not self._has_failed:
            self._has_failed = True
            self._warn(problem)

    def _warn(self, problem: object) -> None:
        log.warning(
            "metrics.trackers: %s: %s. The run goes on; %s lacks what it cannot be sent, and "
            "metrics.jsonl has all metrics",
            *(self._name, problem, self._name),
        )

    def _send_all(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._closing.wait(SECONDS_BETWEEN_SENDS)  # then once more
            if self._is_open or self._opens():
                self._send()
            elif not is_last:
                self._closing.wait(SECONDS_BETWEEN_TRIES)
        if self._is_open:
            self._try(self._tracker.close)

    def _opens(self) -> bool:
        """Tries to open a run of the tracker."""
        self._is_open = self._try(lambda: self._tracker.open(self._run))
        if self._is_open and self._run.step:
            log.info(
                "metrics.trackers: %s keeps the steps that it has: from step %d on they are in a "
                "new run, %s, of the group %s",
                *(self._name, self._run.step, self._run.name, self._run.group),
            )
        return self._is_open

    def _send(self) -> None:
        """Sends what is in the queue."""
        metrics: list[dict[str, float]] = []
        for _ in range(len(self._queue)):
            if not self._is_open:  # after a rollback: the rest is for the next run
                return
            record = self._queue.popleft()
            if EVENT in record:
                self._send_metrics(metrics)
                metrics = []
                self._send_event(record)
            else:
                metrics.append(_numbers(record))
        self._send_metrics(metrics)

    def _send_metrics(self, metrics: list[dict[str, float]]) -> None:
        if metrics:
            self._try(lambda: self._tracker.log(metrics), len(metrics))

    def _send_event(self, record: Mapping[str, Any]) -> None:
        step, event, text = record["step"], record[EVENT], record["text"]
        if event == "rollback":
            self._try(self._tracker.close)
            self._run = replace(self._run, step=step)
            self._opens()
        if self._is_open:
            self._try(lambda: self._tracker.log_event(step, event, text), 1)
        if event == "export" and self._sends_exports:
            self._try(lambda: self._tracker.log_folder(Path(text)), 1, is_long=True)

    def _try(self, call: Callable[[], None], records: int = 0, is_long: bool = False) -> bool:
        """Whether a call was successful; if not, so many records are lost. `is_long`: it sends
        files, and may take as long as they need."""
        self._called = None if is_long else time.monotonic()
        try:
            call()
        except Exception as error:
            self._lost += records
            self._tell(f"{type(error).__name__}: {error}")
            return False
        finally:
            self._called = None
        return True


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in record.items() if isinstance(value, int | float)}
