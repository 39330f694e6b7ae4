"""The grammar of control lines: a closed set of commands, and the one parser.

A command is a frozen dataclass. Its `forms` are its grammar: words in lower case stand for
themselves, words in capitals for a value of that kind (`_kinds`), which becomes the field of the
same name. The parser, what it says of mistakes, and `help` are all made from them.
"""

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from harness.control.live import checked_value, live_keys
from harness.errors import CommandError, ConfigError, did_you_mean

LONGEST_QUOTE = 80  # characters of a wrong line that an answer repeats


@dataclass(frozen=True)
class Command:
    """Something that the run can be told, or asked."""

    forms: ClassVar[tuple[str, ...]] = ()


@dataclass(frozen=True)
class Query(Command):
    """A question: rank 0 answers it alone and at once, whatever the run is doing."""


@dataclass(frozen=True)
class Change(Command):
    """Alters what a checkpoint of this step would hold."""


@dataclass(frozen=True)
class Save(Command):
    """Writes a checkpoint; one with a NAME is never pruned."""

    forms = ("save", "save as NAME")
    name: str | None = None


@dataclass(frozen=True)
class Export(Command):
    """Writes plain weights; FORMAT: sft (as by default) or pt."""

    forms = ("export", "export FORMAT")
    format: str = "sft"


@dataclass(frozen=True)
class Eval(Command):
    """Evaluates on the held-out data."""

    forms = ("eval",)


@dataclass(frozen=True)
class Quit(Command):
    """Ends the run here, saved and exported as at its end."""

    forms = ("quit",)


@dataclass(frozen=True)
class EvalQuit(Quit):
    """Evaluates, then does as quit."""

    forms = ("eval_quit",)


@dataclass(frozen=True)
class QuitUnsaved(Quit):
    """Ends the run here, and saves and exports nothing."""

    forms = ("quit!",)


@dataclass(frozen=True)
class Interrupt(Quit):
    """A signal's doing: ends the run here, saved in any case, and not exported."""

    signal: int


@dataclass(frozen=True)
class Pause(Command):
    """Takes no further step until resume; other commands are obeyed meanwhile."""

    forms = ("pause",)


@dataclass(frozen=True)
class Resume(Command):
    """Goes on after pause."""

    forms = ("resume",)


@dataclass(frozen=True)
class SetLr(Change):
    """Holds the learning rate (of one engine) at RATE, whatever the schedule says."""

    forms = ("lr RATE", "lr ENGINE RATE")
    rate: float
    engine: str | None = None


@dataclass(frozen=True)
class ScaleLr(Change):
    """Multiplies the learning rate (of one engine) from here on, as in lr x0.5."""

    forms = ("lr xFACTOR", "lr ENGINE xFACTOR")
    factor: float
    engine: str | None = None


@dataclass(frozen=True)
class FollowSchedule(Change):
    """Gives the learning rate (of one engine) back to the schedule."""

    forms = ("lr auto", "lr ENGINE auto")
    engine: str | None = None


@dataclass(frozen=True)
class SetLossScale(Change):
    """Sets the loss scale of the engines that compute in fp16."""

    forms = ("loss_scale SCALE", "loss_scale ENGINE SCALE")
    scale: float
    engine: str | None = None


@dataclass(frozen=True)
class SetClip(Change):
    """Clips gradients (of one engine) to NORM; 0: not at all."""

    forms = ("clip NORM", "clip ENGINE NORM")
    norm: float
    engine: str | None = None


@dataclass(frozen=True)
class SetSteps(Change):
    """Moves the end of the run, and with it the schedule's, to step N."""

    forms = ("steps N",)
    n: int


@dataclass(frozen=True)
class Profile(Command):
    """Traces the next N steps on every rank."""

    forms = ("profile N",)
    n: int


@dataclass(frozen=True)
class SetLog(Command):
    """Logs from LEVEL on: debug, info, warning or error."""

    forms = ("log LEVEL",)
    level: str


@dataclass(frozen=True)
class Set(Change):
    """Changes a key of the config; `set` alone lists those that can be."""

    forms = ("set KEY VALUE",)
    key: str
    value: str


@dataclass(frozen=True)
class At(Change):
    """Obeys COMMAND at the end of step STEP; COMMAND@STEP alone does as well."""

    forms = ("event COMMAND@STEP",)
    command: str
    step: int


@dataclass(frozen=True)
class Every(Change):
    """Obeys COMMAND at the end of every step that is a multiple of N."""

    forms = ("event COMMAND every N",)
    command: str
    n: int


@dataclass(frozen=True)
class ClearEvents(Change):
    """Forgets all events, or the one of number ID."""

    forms = ("event clear", "event clear ID")
    id: int | None = None


@dataclass(frozen=True)
class ShowEvents(Query):
    """Lists the pending events."""

    forms = ("event show",)


@dataclass(frozen=True)
class ShowSettings(Query):
    """Lists the keys of the config that can be set, and their values."""

    forms = ("set",)


@dataclass(frozen=True)
class Status(Query):
    """Tells where the run is and what live commands have changed."""

    forms = ("status",)


@dataclass(frozen=True)
class TimeLeft(Query):
    """Estimates the time left to the end of the run, or to STEP."""

    forms = ("time", "time to STEP")
    step: int | None = None


@dataclass(frozen=True)
class Help(Query):
    """Lists all commands."""

    forms = ("help",)


@dataclass(frozen=True)
class TaskCommand(Change):
    """A command of the task's own, with its arguments."""

    name: str
    args: tuple[str, ...] = ()


COMMANDS: tuple[type[Command], ...] = (
    *(Save, Export, Eval, Quit, EvalQuit, QuitUnsaved, Pause, Resume),
    *(SetLr, ScaleLr, FollowSchedule, SetLossScale, SetClip, SetSteps, Profile, SetLog),
    *(Set, ShowSettings, At, Every, ShowEvents, ClearEvents, Status, TimeLeft, Help),
)


class Grammar:
    """What a run understands: the commands above, for its trained engines and its task.

    `task_commands`: what the task's own commands do, by name.
    """

    def __init__(self, engines: Sequence[str], task_commands: Mapping[str, str]) -> None:
        self._kinds = _kinds(engines)
        self._task_commands = task_commands
        self._forms = [(form.split(), command) for command in COMMANDS for form in command.forms]

    def parse(self, line: str) -> Command:
        """The command on a line. Raises CommandError that says what would have been understood."""
        match line.split():
            case ["event", *words, "every", number]:
                return Every(*self._event(line, "N", words, number))
            case [*words] if "@" in line:
                head, _, number = line.rpartition("@")
                words = head.split()
                words = words[1:] if words[:1] == ["event"] else words
                return At(*self._event(line, "STEP", words, number.strip()))
            case words:
                return self._plain(line, words)

    def help(self) -> str:
        """All forms, and what they do."""
        rows = [("  ".join(command.forms), inspect.getdoc(command)) for command in COMMANDS]
        rows += self._task_commands.items()
        width = max(len(forms) for forms, _ in rows)
        return "\n".join(f"{forms:<{width}}  {does}" for forms, does in rows)

    def _event(self, line: str, kind: str, words: Sequence[str], number: str) -> tuple[str, int]:
        """The command of an event, and the number that says when; both are checked."""
        text = " ".join(words)
        if isinstance(self._plain(line, words), ClearEvents | Query):
            raise CommandError(f"{_quoted(line)}: {_quoted(text)} cannot wait for a step")
        try:
            return text, self._kinds[kind](number)
        except ValueError as error:
            known = f"{At.forms[0]} | {Every.forms[0]}"
            raise CommandError(f"{_quoted(line)}: {kind}: {error}; known: {known}") from None

    def _plain(self, line: str, words: Sequence[str]) -> Command:
        if words and words[0] in self._task_commands:
            return TaskCommand(words[0], tuple(words[1:]))
        misses: list[_Miss] = []
        for form, command in self._forms:
            try:
                made = command(**self._match(form, words))
                if isinstance(made, Set):
                    checked_value(made.key, made.value)
                return made
            except _Miss as miss:
                misses.append(miss)
            except ConfigError as error:
                raise CommandError(f"{_quoted(line)}: {error}") from None
        miss = max(misses, key=lambda miss: miss.nearness)
        if not miss.nearness[0]:
            raise CommandError(f"{_quoted(line)}: unknown command{self._nearest(words)}")
        raise CommandError(f"{_quoted(line)}: {miss}; known: {self._usage(words[0])}")

    def _match(self, form: Sequence[str], words: Sequence[str]) -> dict[str, Any]:
        """The fields that the words give in this form. Raises _Miss."""
        fields: dict[str, Any] = {}
        same_length = len(form) == len(words)
        for depth, token in enumerate(form):
            if depth >= len(words):
                raise _Miss(f"{token} is missing", depth, same_length)
            if token.islower() or token.startswith("COMMAND"):
                if words[depth] != token:
                    raise _Miss(f"found {_quoted(words[depth])}", depth, same_length)
                continue
            text = " ".join(words[depth:]) if token == "VALUE" else words[depth]
            try:
                fields[token.removeprefix("x").lower()] = self._kinds[token](text)
            except ValueError as error:
                is_like_it = token.startswith("x") and text.startswith("x")
                raise _Miss(f"{token}: {error}", depth, same_length, is_like_it) from None
        if len(words) > len(form) and form[-1] != "VALUE":
            raise _Miss(f"found {_quoted(words[len(form)])} too much", len(form), same_length)
        return fields

    def _nearest(self, words: Sequence[str]) -> str:
        known = {form[0] for form, _ in self._forms} | set(self._task_commands)
        hint = did_you_mean(words[0], sorted(known)) if words else ""
        near = hint.split("'")[1] if hint else ""
        return f"{hint}: {self._usage(near) or near}" if near else "; help lists all"

    def _usage(self, word: str) -> str:
        return " | ".join(" ".join(form) for form, _ in self._forms if form[0] == word)


class _Miss(Exception):
    """Words that are not of a form, from the word number `depth` on."""

    def __init__(self, reason: str, depth: int, same_length: bool, is_like_it: bool = False):
        super().__init__(reason)
        self.nearness = (depth, same_length, is_like_it)


Kind = Callable[[str], Any]


def _kinds(engines: Sequence[str]) -> dict[str, Kind]:
    """What a word in capitals stands for: text to value, or ValueError."""
    return {
        "NAME": _name,
        "FORMAT": _one_of(["sft", "pt"]),
        "RATE": _number("a learning rate"),
        "xFACTOR": _factor,
        "SCALE": _number("a loss scale", positive=True),
        "NORM": _number("a norm"),
        "ENGINE": _one_of(engines),
        "N": _whole,
        "STEP": _whole,
        "ID": _whole,
        "LEVEL": _one_of(["debug", "info", "warning", "error"]),
        "KEY": _one_of(live_keys()),
        "VALUE": str,
    }


def _name(text: str) -> str:
    if not re.fullmatch(r"[\w.-]{1,100}", text):
        raise ValueError(f"a name is made of letters, digits and .-_, found {_quoted(text)}")
    return text


def _number(what: str, positive: bool = False) -> Kind:
    expected = f"{what} is a finite number {'above 0' if positive else 'from 0 on'}"

    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not (math.isfinite(number) and number >= 0 and (number or not positive)):
            raise ValueError(f"{expected}, found {_quoted(text)}")
        return number

    return read


def _factor(text: str) -> float:
    if not text.startswith("x"):
        raise ValueError(f"a factor looks like x0.5, found {_quoted(text)}")
    return _number("a factor", positive=True)(text[1:])


def _whole(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,12}", text) or int(text) < 1:
        raise ValueError(f"expected a whole number from 1 on, found {_quoted(text)}")
    return int(text)


def _one_of(known: Sequence[str]) -> Kind:
    def read(text: str) -> str:
        if text not in known:
            hint = did_you_mean(text, known)
            raise ValueError(f"found {_quoted(text)}{hint}, expected {', '.join(known)}")
        return text

    return read


def _quoted(text: str) -> str:
    cut = text if len(text) <= LONGEST_QUOTE else f"{text[:LONGEST_QUOTE]}..."
    return repr(cut)
