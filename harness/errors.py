"""Errors that are addressed to the user: one readable message, an exit code, no traceback.

Where the ranks have agreed on an error (`distributed.raise_on_all_ranks`), rank 0 speaks for all.
"""

import difflib
from collections.abc import Iterable


class HarnessError(Exception):
    """What the user can mend: the entry point prints the message and exits with `code`."""

    code = 1
    agreed = False
    """Whether every rank has raised the same error."""


class ConfigError(HarnessError):
    """A wrong, missing or impossible setting: the same start again fails in the same way."""

    code = 2


class CheckpointError(HarnessError):
    """A checkpoint that cannot be written, read, or used by this run."""


class FormatError(HarnessError):
    """A file of weights that is damaged, hostile, or of another kind; or what none can hold."""


class CommandError(HarnessError):
    """A control command that cannot be understood or obeyed; the run goes on."""


class TaskError(HarnessError):
    """The user's own task failed or broke its contract."""


class LostRank(HarnessError):
    """Another rank is gone or does not answer: its process, its node or the network."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`" (did you mean 'steps'?)"` for the known word nearest to `word`, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
