"""Values that are made of plainer ones by one call: times, paths, namespaces, deques, ...

`parts` of a value are the arguments of that call; a `json_tree` stores them under the value's tag.
"""

from argparse import Namespace
from collections import defaultdict, deque
from collections.abc import Callable
from datetime import date, datetime, time, timedelta, timezone
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import SimpleNamespace
from typing import Any

_FACTORIES = {kind.__name__: kind for kind in (dict, list, set, tuple, int, float, str, bool)}
_PATHS = {kind.__name__: kind for kind in (PurePosixPath, PureWindowsPath, type(Path()))}


def _moment(value: datetime | time) -> list[Any] | None:
    """ISO 8601, and the fold; None if its time zone is not a fixed offset."""
    is_fixed = type(value.tzinfo) in (timezone, type(None))
    return [value.isoformat(), value.fold] if is_fixed else None


def _default_dict(value: defaultdict[Any, Any]) -> list[Any] | None:
    factory = getattr(value.default_factory, "__name__", None)
    is_known = value.default_factory in (None, _FACTORIES.get(str(factory)))
    return [factory, dict(value)] if is_known else None


_MADE_OF: dict[str, tuple[type, Callable[[Any], list[Any] | None], Callable[..., Any]]] = {
    "deque": (deque, lambda d: [list(d), d.maxlen], deque),
    "defaultdict": (
        defaultdict,
        _default_dict,
        lambda name, items: defaultdict(None if name is None else _FACTORIES[name], items),
    ),
    "Namespace": (Namespace, lambda n: [vars(n)], lambda values: Namespace(**values)),
    "SimpleNamespace": (
        SimpleNamespace,
        lambda n: [vars(n)],
        lambda values: SimpleNamespace(**values),
    ),
    "range": (range, lambda r: [r.start, r.stop, r.step], range),
    "slice": (slice, lambda s: [s.start, s.stop, s.step], slice),
    "date": (date, lambda d: [d.isoformat()], date.fromisoformat),
    "datetime": (datetime, _moment, lambda t, fold: datetime.fromisoformat(t).replace(fold=fold)),
    "time": (time, _moment, lambda t, fold: time.fromisoformat(t).replace(fold=fold)),
    "timedelta": (timedelta, lambda d: [d.days, d.seconds, d.microseconds], timedelta),
    **{
        name: (kind, lambda path: [str(path)], lambda text, kind=kind: kind(text))
        for name, kind in _PATHS.items()
    },
}
"""By tag: the type, its parts, or None if they cannot be stored, and the call that makes it."""

TAGS = {kind: tag for tag, (kind, _, _) in _MADE_OF.items()}
"""The tag of each type."""
MAKERS = {tag: make for tag, (_, _, make) in _MADE_OF.items()}
"""What makes a value of its parts, by tag."""


def parts(value: Any) -> list[Any] | None:
    """What a value of one of the types is made of; None if it cannot be stored."""
    return _MADE_OF[TAGS[type(value)]][1](value)
