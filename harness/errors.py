"""Errors for the user: one readable message, an exit code, no traceback.

An error that is raised on all ranks (`distributed.raise_on_all_ranks`) is printed by rank 0 only.
"""

import re
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Literal

RESTART_CODE = 75
"""The exit code of an end that a restart may mend (EX_TEMPFAIL of sysexits.h)."""

Kind = Literal[
    "complete",  # all steps are taken
    "quit",  # by a command
    "signal",
    "config",  # ConfigError: a restart fails in the same way
    "task",  # an exception in the task's code
    "checkpoint",  # a save that failed at the end, or a checkpoint that cannot be read
    "gradients",  # GradientError
    "nonfinite",  # too many steps skipped or rolled back
    "lost_rank",
    "hang",
    "oom",
    "error",  # any other
]
"""How a run ends: `health.outcome`."""


class HarnessError(Exception):
    """An error that the user can fix: the entry point prints the message and exits with `code`."""

    code = 1
    kind: Kind = "error"
    on_all_ranks = False
    """Whether every rank raises the same error."""
    rank: int | None = None
    """The one rank that has failed, if others raise the error as well, or that is lost."""


class ConfigError(HarnessError):
    """A wrong, missing or impossible setting: starting again fails in the same way."""

    kind = "config"
    code = 2


class CheckpointError(HarnessError):
    """A checkpoint that cannot be written, read, or used by this run."""

    kind = "checkpoint"


class UnreadableCheckpoint(CheckpointError):
    """A checkpoint that cannot be judged: of a newer format, or one that the disk does not give. It
    may be complete, so it is neither passed over nor removed."""


class FormatError(HarnessError):
    """A file of weights that is damaged, malicious or in another format; or data that the format
    cannot hold."""

    kind = "checkpoint"


class CommandError(HarnessError):
    """A command that is invalid or cannot be executed; the run continues."""


class TaskError(HarnessError):
    """The user's own task failed or broke its contract."""

    kind = "task"


@contextmanager
def no_exit() -> Iterator[None]:
    """Turns an exit by the task's code into a TaskError: the launcher would see a complete run.

    So is all else that is no Exception, which nobody expects: asyncio.CancelledError for one, and
    KeyboardInterrupt, which within a run Ctrl-C does not raise. (GeneratorExit ends generators.)
    """
    try:
        yield
    except (Exception, GeneratorExit):
        raise
    except BaseException as error:
        *_, (file, line, *_) = traceback.extract_tb(error.__traceback__)
        raise TaskError(f"{file}:{line}: the task's code has raised {error!r}") from error


class GradientError(HarnessError):
    """The gradients of a step were wrong, and so are the weights: they must not be saved."""

    kind = "gradients"


class OutOfMemory(HarnessError):
    """Memory of the device, or of the host, has run out; smaller micro-batches may fit."""

    code = RESTART_CODE
    kind = "oom"


class RunDirectoryGone(HarnessError):
    """The run's directory was deleted or moved while the run used it; on rank 0."""

    code = 2
    kind = "config"


class NonFiniteError(HarnessError):
    """Training has failed: too many steps were skipped, or the policy is to end at the first. A
    restart would meet the same; what was saved is good."""

    code = 2
    kind = "nonfinite"


class LostRank(HarnessError):
    """Another rank is gone or does not respond: its process, its node or the network failed."""

    code = RESTART_CODE
    kind = "lost_rank"
    host: str | None = None
    """Where the lost rank ran, and where it failed; as far as they are known."""
    step: int | None = None
    phase: str | None = None


def kind_of(error: BaseException) -> Kind:
    """Of the end that an error leads to."""
    if isinstance(error, HarnessError):
        return error.kind
    if isinstance(error, KeyboardInterrupt):
        return "signal"
    if is_out_of_memory(error):
        return "oom"
    return "task" if not isinstance(error, OSError) and _is_of_task(error) else "error"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the device, or of the host, has run out."""
    if {"OutOfMemoryError", "MemoryError"} & {kind.__name__ for kind in type(error).__mro__}:
        return True
    # torch raises its own class for its allocator of the device alone.
    texts = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


_OF_WORKER = re.compile(r'^ *File "(.+?)", line \d+', re.MULTILINE)
"""A frame in the message of an error that a DataLoader's worker has raised."""


def _is_of_task(error: BaseException) -> bool:
    """Whether it came, here or in a worker, through a file that is not of harness, the libraries,
    or the entry point. An injected fault is the task's."""
    package = Path(__file__).parent
    known = [str(package), *map(sysconfig.get_path, ("stdlib", "purelib", "platlib"))]
    known += [sys.argv[0], "<"]
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    files += _OF_WORKER.findall(str(error))
    injected = str(package / "testing/faults.py")
    return any(f == injected or not f.startswith(tuple(filter(None, known))) for f in files)


def mark_on_all_ranks(error: Exception) -> None:
    """Marks an error that every rank raises in the same way: it is reported once."""
    error.on_all_ranks = True  # type: ignore[attr-defined]


def is_on_all_ranks(error: BaseException) -> bool:
    """Whether every rank raises the same error."""
    return getattr(error, "on_all_ranks", False)


def summary(error: BaseException) -> str:
    """An error without the tracebacks in its message: those of workers, and of other ranks."""
    text = str(error)
    if "Traceback (most recent call last)" in text:
        lines = text.strip().splitlines()
        frames = [number for number, line in enumerate(lines) if line.startswith(" ")]
        text = lines[frames[-1] + 1] if frames and lines[frames[-1] + 1 :] else lines[-1]
    elif not isinstance(error, HarnessError):
        text = f"{type(error).__name__}: {text}"
    return text


def with_notes(error: BaseException) -> str:
    """An error's message, and below it the notes about where it was raised."""
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


@contextmanager
def config_errors_of(table: str) -> Iterator[None]:
    """Prefixes a ConfigError that is raised in the context with the table that it is about."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{table}: {error}") from None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`" (did you mean 'steps'?)"` with the known word closest to `word`, or an empty string."""
    import difflib  # late: only errors need it

    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def compile_pattern(text: str) -> re.Pattern[str]:
    """Compiles a regular expression of the user. Raises ValueError, which quotes it."""
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is not a regular expression: {error}") from None


def printable(name: str) -> str:
    """A name of a file's content for output: quoted and escaped if it holds control characters."""
    return name if name.isprintable() else ascii(name)


def first_few(items: Iterable[object], most: int = 6, between: str = ", ") -> str:
    """`"a, b and 3 more"`: the first `most` items as text, and the number of the others.

    An iterator may be endless, so only one more item is read: "a, b, ...".
    """
    iterator = iter(items)
    text = between.join(map(str, islice(iterator, most)))
    if isinstance(items, Sized):
        return text + (f" and {len(items) - most} more" if len(items) > most else "")
    return text + (f"{between}..." if any(True for _ in iterator) else "")


def counted(count: int, noun: str) -> str:
    """ "1 rank", "2 ranks"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def written_by(rank: int, hosts: Sequence[str]) -> str:
    """The rank that wrote a file of a checkpoint. `hosts`: by rank, as in the manifest."""
    return f"rank {rank} on host {hosts[rank]}" if 0 <= rank < len(hosts) else "an unknown rank"


def missing_files(directory: Path, files: Mapping[str, str], hosts: Iterable[str]) -> str:
    """One line about missing files of a checkpoint and where to find them.

    `files`: their names, each with its `written_by`. `hosts`: where they are missing.
    """
    by_writer: dict[str, list[str]] = {}
    for name, writer in files.items():
        by_writer.setdefault(writer, []).append(name)
    groups = [
        f"{first_few(names)} {'are' if len(names) > 1 else 'is'} missing, written by {writer}"
        for writer, names in by_writer.items()
    ]
    where = sorted(set(hosts))
    return (
        f"{directory} on host{'s' if len(where) > 1 else ''} {first_few(where)}: "
        f"{first_few(groups, between='; ')}: copy the missing files from there into the same "
        "directory"
    )
