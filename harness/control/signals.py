"""Signals as a front: they only leave a note, which the ranks agree on between two steps.

The launchers signal one rank after another, so no rank may act on its own: SIGTERM, SIGINT and
SIGHUP become a saved end of the run, SIGUSR1 a save, on all ranks at the same step. SIGHUP stays
ignored where it was (nohup).
"""

import contextlib
import logging
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from harness.launcher.parent import is_abandoned

log = logging.getLogger(__name__)

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SAVING = signal.SIGUSR1
SECONDS_OF_ONE_STOP = 1.0
"""Ctrl-C reaches a rank twice, from the terminal and from the launcher: that is one stop."""
SECONDS_BETWEEN_LOOKS = 1.0


class Signals:
    """What this rank was signalled since it was last asked.

    Python runs a signal's handler only when the main thread returns to it, which a hanging
    collective never does. So a thread hears of signals, through the wake-up descriptor, and a
    second stop ends the process even then. The thread also looks after the launcher: DeepSpeed's
    dies of SIGTERM alone and leaves its ranks behind, which is a SIGTERM to them, if the first.
    """

    def __init__(self) -> None:
        self._stop = 0
        self._save = False
        self._stopped_at = 0.0
        self._lock = threading.Lock()

    def take(self) -> tuple[int, bool]:
        """`(number of the signal that asks for the end, or 0; whether one asks for a save)`."""
        with self._lock:
            taken = self._stop, self._save
            self._stop, self._save = 0, False
        return taken

    def name(self, number: int) -> str:
        """SIGTERM, for 15."""
        return signal.Signals(number).name

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Hears signals in the context; outside of it they do what they did before.

        Only a process's main thread can: in any other one this does nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        global _before
        ours = [s for s in (*STOPPING, SAVING) if signal.getsignal(s) is not signal.SIG_IGN]
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        _before = {number: signal.signal(number, _noted_elsewhere) for number in ours}
        old_descriptor = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        thread = threading.Thread(
            target=self._listen, args=(reading, set(ours)), name="signals", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(old_descriptor)
            _restore()
            os.close(writing)
            thread.join()
            os.close(reading)

    def _listen(self, descriptor: int, ours: set[signal.Signals]) -> None:
        while True:
            ready, _, _ = select.select([descriptor], [], [], SECONDS_BETWEEN_LOOKS)
            if not ready:
                if not self._stopped_at and is_abandoned():
                    log.warning("the launcher is gone: saving and leaving")
                    self._note(signal.SIGTERM)
                continue
            numbers = os.read(descriptor, 1024)
            if not numbers:
                return
            for number in numbers:
                if number in ours:
                    self._note(signal.Signals(number))

    def _note(self, number: signal.Signals) -> None:
        if number is SAVING:
            with self._lock:
                self._save = True
            return
        now = time.monotonic()
        if self._stopped_at and now - self._stopped_at > SECONDS_OF_ONE_STOP:
            log.warning("%s again: out at once", number.name)
            os._exit(128 + number)
        with self._lock:
            self._stop = number
            self._stopped_at = self._stopped_at or now


_before: dict[signal.Signals, Any] = {}
"""What signals did before they were heard, and do again in forked processes."""


def _restore() -> None:
    for number, handler in _before.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
    _before.clear()


def _hold() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, list(_before))


def _go_on() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, list(_before))


def _let_go() -> None:
    """In a forked process: a signal to it is none to this rank."""
    held = list(_before)
    if held:
        signal.set_wakeup_fd(-1)
        _restore()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, held)


os.register_at_fork(before=_hold, after_in_parent=_go_on, after_in_child=_let_go)


def ignore_signals(worker: int = 0) -> None:
    """For data-loader workers: their rank tells them when to end."""
    for number in (*STOPPING, SAVING):
        signal.signal(number, signal.SIG_IGN)


def _noted_elsewhere(number: int, frame: object) -> None:
    """A handler there must be, or the wake-up descriptor is told nothing."""
