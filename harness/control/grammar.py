"""The parser of control lines, built from the forms of the commands."""

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from harness.config.old_names import current_setting
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
from harness.control.live import live_keys, parse_value
from harness.errors import CommandError, ConfigError, did_you_mean

SYNONYMS: Mapping[str, str] = dict.fromkeys(["exit", "stop", "end", "kill", "q"], "quit")
"""What other programs call a command of ours."""
MAX_QUOTED = 80  # characters of an invalid line that the answer repeats


class Grammar:
    """All commands of a run: the built-in ones, for its trained engines, and the task's.

    `task_commands`: the help of the task's commands, by name. `groups`: of parameters, as
    ENGINE/GROUP.
    """

    def __init__(
        self,
        engines: Sequence[str],
        task_commands: Mapping[str, str],
        groups: Sequence[str] = (),
        keys: Sequence[str] | None = None,
    ) -> None:
        self._kinds = _kinds(engines, groups, live_keys() if keys is None else keys)
        self._task_commands = task_commands
        self._takes_any_text = {"set", *task_commands}  # whose arguments may contain an @
        self._forms = [(form.split(), command) for command in COMMANDS for form in command.forms]

    def parse(self, line: str) -> Command:
        """The command on a line. Raises CommandError with the correct usage."""
        match line.split():
            case ["event", *words, "every", number]:
                return Every(*self._event(line, "N", words, number))
            case [first, *_] if "@" in line and first not in self._takes_any_text:
                head, _, number = line.rpartition("@")
                words = head.split()
                words = words[1:] if words[:1] == ["event"] else words
                return At(*self._event(line, "STEP", words, number.strip()))
            case words:
                return self._unscheduled(line, words)

    def check_event(self, text: str, line: str = "") -> None:
        """Raises CommandError if `text`, on a line or by itself, is no command that can be
        scheduled."""
        line = line or text
        if isinstance(self._unscheduled(line, text.split()), ClearEvents | Query):
            raise CommandError(f"{_quoted(line)}: {_quoted(text)} cannot be scheduled")

    def help(self) -> str:
        """The forms and the help of all commands."""
        rows = [("  ".join(command.forms), inspect.getdoc(command)) for command in COMMANDS]
        rows += self._task_commands.items()
        width = max(len(forms) for forms, _ in rows)
        return "\n".join(f"{forms:<{width}}  {text}" for forms, text in rows)

    def _event(self, line: str, kind: str, words: Sequence[str], number: str) -> tuple[str, int]:
        """An event's command, and its step or period; both are checked."""
        text = " ".join(words)
        self.check_event(text, line)
        try:
            return text, self._kinds[kind](number)
        except ValueError as error:
            usage = f"{At.forms[0]} | {Every.forms[0]}"
            raise CommandError(f"{_quoted(line)}: {kind}: {error}; usage: {usage}") from None

    def _unscheduled(self, line: str, words: Sequence[str]) -> Command:
        """The command of a line without event, @STEP and every N."""
        if words and words[0] in self._task_commands:
            return TaskCommand(words[0], tuple(words[1:]))
        if words[:1] == ["set"] and len(words) > 2:
            words = ["set", *current_setting(words[1], " ".join(words[2:]))]
        mismatches: list[_Mismatch] = []
        for form, command in self._forms:
            try:
                parsed = command(**self._match(form, words))
                if isinstance(parsed, Set):
                    parse_value(parsed.key, parsed.value)
                return parsed
            except _Mismatch as mismatch:
                mismatches.append(mismatch)
            except ConfigError as error:
                raise CommandError(f"{_quoted(line)}: {error}") from None
        nearest = max(mismatches, key=lambda mismatch: mismatch.nearness)
        if not nearest.nearness[0]:
            raise CommandError(f"{_quoted(line)}: unknown command{self._suggestion(words)}")
        raise CommandError(f"{_quoted(line)}: {nearest}; usage: {self._usage(words[0])}")

    def _match(self, form: Sequence[str], words: Sequence[str]) -> dict[str, Any]:
        """The command's fields, if the words have this form. Raises _Mismatch."""
        fields: dict[str, Any] = {}
        same_length = len(form) == len(words)
        for depth, token in enumerate(form):
            if depth >= len(words):
                raise _Mismatch(f"{token} is missing", depth, same_length)
            if token.islower() or token.startswith("COMMAND"):  # `parse` reads COMMAND
                if words[depth] != token or not token.islower():
                    raise _Mismatch(f"unexpected {_quoted(words[depth])}", depth, same_length)
                continue
            text = " ".join(words[depth:]) if token == "VALUE" else words[depth]
            try:
                field = token.removeprefix("x").partition("[")[0].lower()
                fields[field] = self._kinds[token](text)
            except ValueError as error:
                is_similar = token.startswith("x") and text.startswith("x")
                raise _Mismatch(f"{token}: {error}", depth, same_length, is_similar) from None
        if len(words) > len(form) and form[-1] != "VALUE":
            raise _Mismatch(f"unexpected {_quoted(words[len(form)])}", len(form), same_length)
        return fields

    def _suggestion(self, words: Sequence[str]) -> str:
        known = {form[0] for form, _ in self._forms} | set(self._task_commands)
        first = SYNONYMS.get(words[0], words[0]) if words else ""
        hint = did_you_mean(first, sorted(known))
        nearest = hint.split("'")[1] if hint else ""
        return (
            f"{hint}: {self._usage(nearest) or nearest}" if nearest else "; help lists all commands"
        )

    def _usage(self, word: str) -> str:
        return " | ".join(" ".join(form) for form, _ in self._forms if form[0] == word)


class _Mismatch(Exception):
    """Words that do not match a form, from word number `depth` on."""

    def __init__(self, reason: str, depth: int, same_length: bool, is_similar: bool = False):
        super().__init__(reason)
        self.nearness = (depth, same_length, is_similar)


Kind = Callable[[str], Any]


def _kinds(engines: Sequence[str], groups: Sequence[str], keys: Sequence[str]) -> dict[str, Kind]:
    """The parser of each word in capitals: from text to value, or ValueError."""
    return {
        "NAME": _name,
        "FORMAT": _one_of(["sft", "pt"]),
        "RATE": _number("a learning rate"),
        "xFACTOR": _factor,
        "SCALE": _number("a loss scale", positive=True),
        "NORM": _number("a norm"),
        "ENGINE": _one_of(engines),
        "ENGINE[/GROUP]": _engine_or_group(engines, groups),
        "N": _positive_integer,
        "STEP": _positive_integer,
        "ID": _positive_integer,
        "LEVEL": _one_of(["debug", "info", "warning", "error"]),
        "KEY": _one_of(keys),
        "VALUE": str,
    }


def _name(text: str) -> str:
    if not re.fullmatch(r"[\w.-]{1,100}", text) or text.endswith(".tmp"):
        raise ValueError(f"found {_quoted(text)}, expected letters, digits and .-_")
    return text


def _number(what: str, positive: bool = False) -> Kind:
    expected = f"{what} is a finite number {'above 0' if positive else '>= 0'}"

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


def _positive_integer(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,12}", text) or int(text) < 1:
        raise ValueError(f"expected a positive integer, found {_quoted(text)}")
    return int(text)


def _one_of(known: Sequence[str]) -> Kind:
    def read(text: str) -> str:
        if text not in known:
            hint = did_you_mean(text, known)
            raise ValueError(f"found {_quoted(text)}{hint}, expected {', '.join(known)}")
        return text

    return read


def _engine_or_group(engines: Sequence[str], groups: Sequence[str]) -> Kind:
    """ENGINE, ENGINE/GROUP, or of the only engine GROUP, which is read as ENGINE/GROUP."""
    read = _one_of([*engines, *groups])
    is_only = len(engines) == 1
    full_names = {group.partition("/")[2]: group for group in groups if is_only}
    return lambda text: read(text if text in engines else full_names.get(text, text))


def _quoted(text: str) -> str:
    return repr(text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}...")
