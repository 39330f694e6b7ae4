"""What rank 0 shows: a progress bar that log lines do not break, or lines where there is no TTY."""

import contextlib
import logging
import sys
import time
from collections.abc import Mapping
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

from tqdm import tqdm

from harness import distributed
from harness.utils import say

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A tqdm bar over the run's steps; on a plain output, a log line every ten seconds."""

    def __init__(self, step: int, steps: int, shown: bool):
        self._steps = steps
        self._next_line = time.monotonic()
        on_terminal = shown and sys.stderr.isatty()
        self._lines = shown and not on_terminal
        self._bar = tqdm(
            total=steps, initial=step, disable=not on_terminal, unit="step", dynamic_ncols=True
        )

    def show(self, record: Mapping[str, Any]) -> None:
        """Shows a step's record."""
        numbers = {
            name: f"{value:.4g}"
            for name, value in record.items()
            if name.rpartition("/")[2] in ("loss", "lr", "tokens_per_s")
        }
        try:
            self._bar.set_postfix(numbers, refresh=False)
            self._bar.update(record["step"] - self._bar.n)
        except OSError:  # the terminal is gone
            self._bar.disable = True
        if self._lines and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
            shown = "  ".join(f"{name} {number}" for name, number in numbers.items())
            log.info("step %d/%d  %s", record["step"], self._steps, shown)

    def set_steps(self, steps: int) -> None:
        """Takes note of another end of the run."""
        self._steps = self._bar.total = steps

    def close(self) -> None:
        """Leaves the bar as it stands."""
        with contextlib.suppress(OSError):
            self._bar.close()


class _BarHandler(logging.Handler):
    """Writes log lines above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


def configure_logging() -> None:
    """Shows harness's log on the terminal: rank 0 from INFO on, other ranks from WARNING on.

    What is logged before there is a run directory is kept for `log_to_file`.
    """
    logger = logging.getLogger("harness")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = [h for h in logger.handlers if not isinstance(h, _BarHandler | MemoryHandler)]
    for handler in (_BarHandler(), MemoryHandler(capacity=10_000)):
        _set_up(handler)
        logger.addHandler(handler)


def log_to_file(path: Path) -> logging.Handler:
    """Appends the log to a file that all ranks share, line by line. Returns the handler."""
    handler = logging.FileHandler(path)
    _set_up(handler)
    logger = logging.getLogger("harness")
    for early in [h for h in logger.handlers if isinstance(h, MemoryHandler)]:
        early.setTarget(handler)
        early.close()
        logger.removeHandler(early)
    logger.addHandler(handler)
    return handler


def set_log_level(level: str) -> None:
    """Logs from a level on ("debug", "info", ...): rank 0; the other ranks from WARNING on."""
    logger = logging.getLogger("harness")
    logger.setLevel(level.upper())
    for handler in logger.handlers:
        least = logging.WARNING if distributed.global_rank() else logging.DEBUG
        handler.setLevel(max(least, logger.level))


def _set_up(handler: logging.Handler) -> None:
    rank = distributed.global_rank()
    style = f"%(asctime)s rank {rank} %(levelname)s %(message)s"
    handler.setFormatter(logging.Formatter(style, "%Y-%m-%d %H:%M:%S"))
    handler.setLevel(logging.WARNING if rank else logging.INFO)
