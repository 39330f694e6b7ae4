"""The one parser of control lines, made from the forms of the commands."""

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from harness.control.commands import (
    COMMANDS,
    At,
    ClearEvents,
    Command,
    Every,
    Query,
    Set,
    TaskCommand,
)
from harness.control.live import checked_value, live_keys
from harness.errors import CommandError, ConfigError, did_you_mean

LONGEST_QUOTE = 80  # characters of a wrong line that an answer repeats


class Grammar:
    """What a run understands: all commands, for its trained engines and its task.

    `task_commands`: what the task's own commands do, by name.
    """

    def __init__(self, engines: Sequence[str], task_commands: Mapping[str, str]) -> None:
        self._kinds = _kinds(engines)
        self._task_commands = task_commands
        self._takes_any_text = {"set", *task_commands}  # what follows may hold an @
        self._forms = [(form.split(), command) for command in COMMANDS for form in command.forms]

    def parse(self, line: str) -> Command:
        """The command on a line. Raises CommandError that says what would have been understood."""
        match line.split():
            case ["event", *words, "every", number]:
                return Every(*self._event(line, "N", words, number))
            case [first, *_] if "@" in line and first not in self._takes_any_text:
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
            if token.islower() or token.startswith("COMMAND"):  # COMMAND is `parse`'s own affair
                if words[depth] != token or not token.islower():
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
    if not re.fullmatch(r"[\w.-]{1,100}", text) or text.endswith(".tmp"):
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
