"""Logging to the terminal and to the log file.

Each line has its rank. Rank 0 logs at INFO and above, the other ranks at WARNING and above.
"""

import contextlib
import logging
import os
import sys
from logging.handlers import MemoryHandler
from pathlib import Path

from tqdm import tqdm

LINES_BEFORE_THE_FILE = 10_000
"""Log lines kept in memory until `log_to_file`."""


def write_to_terminal(text: str) -> None:
    """Writes a line to standard error, above a progress bar."""
    with contextlib.suppress(OSError):  # a closed terminal must not end the run
        tqdm.write(text, file=sys.stderr)


class _TerminalHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        write_to_terminal(self.format(record))


class _FileHandler(logging.FileHandler):
    """Appends to a file; if it cannot, as on a full disk, the terminal tells so once."""

    _failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            self._report(error)
        else:
            super().handleError(record)

    def close(self) -> None:
        try:
            super().close()
        except OSError as error:
            self._report(error)

    def _report(self, error: OSError) -> None:
        if not self._failed:
            write_to_terminal(f"cannot write {self.baseFilename}: {error}; it will lack lines")
        self._failed = True


def configure_logging() -> None:
    """Logs to the terminal, and keeps the lines for `log_to_file`."""
    logger = logging.getLogger("harness")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    previous = (_TerminalHandler, MemoryHandler)
    logger.handlers = [h for h in logger.handlers if not isinstance(h, previous)]
    for handler in (_TerminalHandler(), MemoryHandler(capacity=LINES_BEFORE_THE_FILE)):
        _set_up(handler)
        logger.addHandler(handler)


def set_deepspeed_level(level: str) -> None:
    """Sets the level of DeepSpeed's own logger, which writes to the terminal only."""
    logger = logging.getLogger("DeepSpeed")
    for each in (logger, *logger.handlers):
        each.setLevel(level.upper())


def log_to_file(path: Path) -> logging.Handler:
    """Appends the log to a file shared by all ranks. Returns the handler.

    Starts with the lines logged since `configure_logging`.
    """
    handler = _FileHandler(path)
    _set_up(handler)
    logger = logging.getLogger("harness")
    for buffer in [h for h in logger.handlers if isinstance(h, MemoryHandler)]:
        buffer.setTarget(handler)
        buffer.close()
        logger.removeHandler(buffer)
    logger.addHandler(handler)
    return handler


def set_log_level(level: str) -> None:
    """Sets the log level ("debug", "info", ...); on ranks other than 0, at least WARNING."""
    logger = logging.getLogger("harness")
    logger.setLevel(level.upper())
    for handler in logger.handlers:
        handler.setLevel(max(logging.WARNING if _rank() else logging.DEBUG, logger.level))


def _set_up(handler: logging.Handler) -> None:
    line = f"%(asctime)s rank {_rank()} %(levelname)s %(message)s"
    handler.setFormatter(logging.Formatter(line, "%Y-%m-%d %H:%M:%S"))
    handler.setLevel(logging.WARNING if _rank() else logging.INFO)


def _rank() -> int:
    """This process's rank; `distributed.global_rank` is above this module."""
    return int(os.environ.get("RANK", 0))
