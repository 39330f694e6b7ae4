"""Dataclasses from JSON, every value checked by its field's type.

For what is read where somebody waits for it: pydantic, which checks the config, takes 0.1 s to
import.
"""

from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")

_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
_NAMES |= {NoneType: "null", dict: "an object", list: "a list"}


class Mistake(NamedTuple):
    """What is wrong with a value."""

    key: str
    """Where it is, keys joined with dots; empty for the whole."""
    reason: str
    value: Any = None
    is_unknown: bool = False
    """Whether there is no such field."""

    def __str__(self) -> str:
        return f"{self.key} {self.reason}".lstrip()


class RecordError(ValueError):
    """The mistakes in a record, at least one."""

    def __init__(self, mistakes: list[Mistake]):
        super().__init__("; ".join(map(str, mistakes)))
        self.mistakes = mistakes


def from_json(kind: type[T], value: Any) -> T:
    """A dataclass from what `json.loads` has returned. Raises RecordError.

    Its fields are int, float (or an integer), str, bool, None, unions of these, Literals, lists,
    dicts, and dataclasses. One that has a default may be left out.
    """
    mistakes: list[Mistake] = []
    record = _check_of(kind)(value, "", mistakes)
    if mistakes:
        raise RecordError([each._replace(key=each.key.removeprefix(".")) for each in mistakes])
    return record


_Check = Callable[[Any, str, list[Mistake]], Any]
"""From a value, its key, and a list that mistakes are added to, to what the field gets."""


@cache
def _check_of(kind: Any) -> _Check:
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _record_check(kind)
    if origin is dict:
        return _dict_check(_check_of(arguments[1]))
    if origin is list:
        return _list_check(_check_of(arguments[0]))
    if origin is Literal:
        return _value_check(arguments, " or ".join(map(repr, arguments)), lambda value: value)
    types = arguments if isinstance(kind, UnionType) else (kind,)
    expected = " or ".join(_NAMES[each] for each in types)
    return _value_check({*types, int} if float in types else {*types}, expected, type)


def _value_check(valid: Any, expected: str, kind_of: Callable[[Any], Any]) -> _Check:
    def check(value: Any, key: str, mistakes: list[Mistake]) -> Any:
        if kind_of(value) not in valid:
            mistakes.append(Mistake(key, f"is {value!r:.40}, expected {expected}", value))
        return value

    return check


def _list_check(check_item: _Check) -> _Check:
    check_list = _check_of(list)

    def check(value: Any, key: str, mistakes: list[Mistake]) -> Any:
        check_list(value, key, mistakes)
        items = enumerate(value) if type(value) is list else ()
        return [check_item(item, f"{key}.{index}", mistakes) for index, item in items]

    return check


def _dict_check(check_item: _Check) -> _Check:
    check_dict = _check_of(dict)

    def check(value: Any, key: str, mistakes: list[Mistake]) -> Any:
        check_dict(value, key, mistakes)
        items = value.items() if type(value) is dict else ()
        return {name: check_item(item, f"{key}.{name}", mistakes) for name, item in items}

    return check


def _record_check(kind: Any) -> _Check:
    types = get_type_hints(kind)
    checks = {field.name: _check_of(types[field.name]) for field in fields(kind)}
    required = {
        field.name
        for field in fields(kind)
        if field.default is MISSING and field.default_factory is MISSING
    }
    check_dict = _check_of(dict)

    def check(value: Any, key: str, mistakes: list[Mistake]) -> Any:
        check_dict(value, key, mistakes)
        known = {}
        for name, item in value.items() if type(value) is dict else ():
            if name in checks:
                known[name] = checks[name](item, f"{key}.{name}", mistakes)
            else:
                mistakes.append(Mistake(f"{key}.{name}", "is unknown", item, is_unknown=True))
        mistakes += [Mistake(f"{key}.{name}", "is missing") for name in required - known.keys()]
        return None if mistakes else kind(**known)

    return check
