"""Signals as a front: a rank only records them, and all ranks act on them after the same step.

Launchers signal the ranks one by one, so a rank must not act on its own. SIGTERM, SIGINT and SIGHUP
save and end the run; SIGUSR1 saves. SIGHUP remains ignored if it was (nohup).
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

from harness.distributed.forks import close_in_forks, end_with_parent
from harness.health import phases
from harness.health.outcome import Outcome
from harness.launcher.parent import is_orphaned

log = logging.getLogger(__name__)

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SAVING = signal.SIGUSR1
SECONDS_OF_ONE_STOP = 1.0
"""Ctrl-C reaches a rank twice, from the terminal and the launcher, which counts as one stop."""
SECONDS_BETWEEN_CHECKS = 1.0
"""Checks that the launcher is still alive."""
_END = b"\0"
"""Ends the thread that reads the numbers of signals."""


class Signals:
    """The signals that this rank has received since the last `take`.

    Python runs signal handlers only when the main thread returns to the interpreter, which never
    happens in a hanging collective. So a thread reads the signals from the wake-up descriptor, and
    a second stop ends the process even then. The thread also watches the launcher: DeepSpeed's dies
    of SIGTERM without ending its ranks, so its death counts as a SIGTERM unless one came first.
    """

    def __init__(self) -> None:
        self._stop = 0
        self._save = False
        self._stopped_at = 0.0
        self._lock = threading.Lock()

    def take(self) -> tuple[int, bool]:
        """`(number of the signal that ends the run, or 0; whether a save was requested)`."""
        with self._lock:
            received = self._stop, self._save
            self._stop, self._save = 0, False
        return received

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Records signals within the context, and restores the previous handlers at its end.

        Only the main thread can install handlers: in any other this does nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        global _previous_handlers
        handled = [s for s in (*STOPPING, SAVING) if signal.getsignal(s) is not signal.SIG_IGN]
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        for descriptor in (reading, writing):
            close_in_forks(descriptor)
        _previous_handlers = {number: signal.signal(number, _do_nothing) for number in handled}
        old_descriptor = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        thread = threading.Thread(
            target=self._listen, args=(reading, set(handled)), name="signals", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(old_descriptor)
            _restore()
            os.write(writing, _END)  # its end does not show while a forked process has a copy
            thread.join()
            os.close(writing)
            os.close(reading)

    def _listen(self, descriptor: int, handled: set[signal.Signals]) -> None:
        while True:
            ready, _, _ = select.select([descriptor], [], [], SECONDS_BETWEEN_CHECKS)
            if not ready:
                if not self._stopped_at and is_orphaned():
                    log.warning("the launcher is gone: saving and exiting")
                    self._record(signal.SIGTERM)
                continue
            numbers = os.read(descriptor, 1024)
            for number in numbers:
                if number in handled:
                    self._record(signal.Signals(number))
            if _END[0] in numbers:
                return

    def _record(self, number: signal.Signals) -> None:
        if number is SAVING:
            with self._lock:
                self._save = True
            return
        now = time.monotonic()
        if self._stopped_at and now - self._stopped_at > SECONDS_OF_ONE_STOP:
            reason = f"{number.name} again: exiting immediately"
            log.warning(reason)
            Outcome("signal", 128 + number, reason, step=phases.now().step).write()
            os._exit(128 + number)
        with self._lock:
            self._stop = number
            self._stopped_at = self._stopped_at or now


_previous_handlers: dict[signal.Signals, Any] = {}
"""The handlers before `Signals.installed`, which forked processes restore."""


def _restore() -> None:
    for number, handler in _previous_handlers.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
    _previous_handlers.clear()


def _block() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, list(_previous_handlers))


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, list(_previous_handlers))


def _detach() -> None:
    """In a forked process: a signal sent to it is not for this rank."""
    blocked = list(_previous_handlers)
    if blocked:
        signal.set_wakeup_fd(-1)
        _restore()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)


os.register_at_fork(before=_block, after_in_parent=_unblock, after_in_child=_detach)


def leave_signals_to_parent(worker: int = 0) -> None:
    """For data-loader workers: they end with their rank, and before it only if it ends them."""
    for number in (*STOPPING, SAVING):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


def _do_nothing(number: int, frame: object) -> None:
    """A Python handler, without which nothing is written to the wake-up descriptor."""
