"""The progress bar of rank 0, or log lines without a terminal or notebook."""

import contextlib
import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from harness.metrics.status import headline

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0
FORMAT = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
BESIDE_NUMBERS = 32
"""Columns of the bar without the numbers of the steps and the metrics."""


def is_notebook() -> bool:
    """Whether this process is the kernel of a Jupyter notebook."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


class _Bar(tqdm):
    """Without tqdm's thread, which would outlive the run: it redraws bars that are updated rarely,
    and this one looks at the clock at every update."""

    monitor_interval = 0


class Progress:
    """A tqdm bar over the steps of the run; where there is neither a terminal nor a notebook, a log
    line every ten seconds."""

    def __init__(self, step: int, steps: int, shown: bool):
        self._steps = steps
        self._next_line = time.monotonic()
        on_terminal = shown and (sys.stderr.isatty() or is_notebook())
        self._lines = shown and not on_terminal
        self._bar = _Bar(
            total=steps,
            initial=step,
            disable=not on_terminal,
            bar_format=FORMAT,
            dynamic_ncols=True,
            miniters=1,
            mininterval=1.0 if is_notebook() else 0.1,  # each drawing is kept in the notebook
        )

    def show(self, record: Mapping[str, Any]) -> None:
        """Shows a step's record."""
        is_line_due = self._lines and time.monotonic() >= self._next_line
        if self._bar.disable and not is_line_due:
            return
        numbers = headline(record)
        try:
            self._bar.set_postfix_str(self._that_fit(numbers), refresh=False)
            self._bar.update(record["step"] - self._bar.n)
        except OSError:  # the terminal is gone
            self._bar.disable = True
        if is_line_due:
            self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
            shown = "  ".join(f"{name} {number}" for name, number in numbers.items())
            log.info("step %d/%d  %s", record["step"], self._steps, shown)

    def _that_fit(self, numbers: Mapping[str, str]) -> str:
        """The first numbers, as many as the terminal has room for."""
        if self._bar.disable:
            return ""
        columns = self._bar.format_dict["ncols"] or 80
        room = columns - BESIDE_NUMBERS - 2 * len(str(self._steps))
        text = ""
        for name, number in numbers.items():
            longer = f"{text}{', ' if text else ''}{name.replace('_per_s', '/s')} {number}"
            if text and len(longer) > room:
                break
            text = longer
        return text

    def set_steps(self, steps: int) -> None:
        """Changes the run's last step."""
        self._steps = self._bar.total = steps

    def close(self) -> None:
        """Closes the bar, and leaves it on the terminal."""
        with contextlib.suppress(OSError):
            self._bar.close()
