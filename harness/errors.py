"""Errors that are addressed to the user: one readable message, an exit code, no traceback.

They are raised alike on every rank, so that rank 0 can speak for all: from what all ranks know, or
through `distributed.in_unison`. What goes wrong on one rank alone is an ordinary exception.
"""

import difflib
from collections.abc import Iterable


class HarnessError(Exception):
    """What the user can mend: the entry point prints the message and exits with `code`."""

    code = 2


class ConfigError(HarnessError):
    """A wrong, missing or impossible setting."""


class CheckpointError(HarnessError):
    """A checkpoint that cannot be written, read, or used by this run."""


class CommandError(HarnessError):
    """A control command that cannot be understood or obeyed; the run goes on."""


class TaskError(HarnessError):
    """The user's own task failed or broke its contract."""

    code = 1


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`" (did you mean 'steps'?)"` for the known word nearest to `word`, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
