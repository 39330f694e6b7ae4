"""The grammar of control lines: a closed set of commands, and the one parser."""

import math
import re
from dataclasses import dataclass

from harness.errors import CommandError, did_you_mean


@dataclass(frozen=True)
class Save:
    """`save [as NAME]`: write a checkpoint; under a name it is never pruned."""

    name: str | None = None


@dataclass(frozen=True)
class Export:
    """`export`: write plain weights."""


@dataclass(frozen=True)
class Eval:
    """`eval`: evaluate on the held-out data."""


@dataclass(frozen=True)
class Quit:
    """`quit`: end the run here, saving as at its end."""


@dataclass(frozen=True)
class SetLr:
    """`lr X`: hold the learning rate of every engine at X."""

    lr: float


Command = Save | Export | Eval | Quit | SetLr

_PLAIN: dict[str, Command] = {"save": Save(), "export": Export(), "eval": Eval(), "quit": Quit()}
_USAGE = "known: save [as NAME], export, eval, quit, lr X"


def parse(line: str) -> Command:
    """The command on a line. Raises CommandError that says what would have been understood."""
    word, *args = line.split()
    if word == "lr":
        return _parse_lr(line, args)
    if word == "save" and args:
        return _parse_save(line, args)
    if word not in _PLAIN:
        hint = did_you_mean(word, [*_PLAIN, "lr"])
        raise CommandError(f"{line!r}: unknown command {word!r}{hint}; {_USAGE}")
    if args:
        raise CommandError(f"{line!r}: {word} takes no argument; {_USAGE}")
    return _PLAIN[word]


def _parse_save(line: str, args: list[str]) -> Save:
    match args:
        case ["as", name] if re.fullmatch(r"[\w.-]+", name):
            return Save(name)
        case _:
            raise CommandError(f"{line!r}: expected save, or save as NAME (letters, digits, .-_)")


def _parse_lr(line: str, args: list[str]) -> SetLr:
    try:
        (text,) = args
        lr = float(text)
    except ValueError:
        raise CommandError(f"{line!r}: expected lr and one number, like: lr 1e-4") from None
    if not (math.isfinite(lr) and lr >= 0):
        raise CommandError(f"{line!r}: a learning rate is finite and not negative")
    return SetLr(lr)
