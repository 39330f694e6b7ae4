"""The globals of Python and numpy whose objects are plain values: they are read as what they are.

Arguments are checked before a class is called: nothing here can take long, or take much memory.
What numpy would make is described only, as numpy is not imported.
"""

import argparse
import collections
import datetime
import pathlib
import struct
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from harness.formats.pickled import Global, PickleError, Unusual, hashable

_FACTORIES = {f"builtins.{t.__name__}": t for t in (dict, list, set, tuple, int, float, str, bool)}
_SCALARS = {"f2": "e", "f4": "f", "f8": "d", "b1": "?"} | {
    f"{kind}{size}": code if kind == "i" else code.upper()
    for kind in "iu"
    for size, code in ((1, "b"), (2, "h"), (4, "i"), (8, "q"))
}
"""Struct codes by numpy's names."""


@dataclass(eq=False)
class NumpyDType:
    """A numpy.dtype; its name in numpy is `text`: "<f4"."""

    CALLED: ClassVar[str] = "a numpy.dtype"
    name: str
    text: str = ""
    """Empty for dtypes of records and objects, which are not supported."""

    def set_state(self, state: Any) -> None:
        """What numpy's `__setstate__` gets."""
        _, order, *fields = state
        text = f"{order if order != '=' else '<'}{self.name}"
        for _, (unit, count, *_) in fields[6:]:
            text += f"[{count if count != 1 else ''}{unit.decode()}]"
        self.text = text if tuple(fields[:3]) == (None, None, None) and "O" not in text else ""


@dataclass(eq=False)
class NumpyArray:
    """A numpy.ndarray. `content` None: of a dtype that is not supported, or never filled."""

    CALLED: ClassVar[str] = "a numpy.ndarray of objects or records"
    dtype: NumpyDType | None = None
    shape: tuple[int, ...] = ()
    content: bytes | None = None
    is_fortran: bool = False

    def set_state(self, state: Any) -> None:
        """What numpy's `__setstate__` gets."""
        _, shape, dtype, is_fortran, content = state
        self.fill(content, dtype, shape, bool(is_fortran))

    def fill(self, content: Any, dtype: Any, shape: Any, is_fortran: bool) -> None:
        """Sets all; the content only if it is plain bytes."""
        if not isinstance(dtype, NumpyDType) or not isinstance(shape, tuple):
            raise PickleError("malformed: a numpy array")
        if len(shape) > 64 or not all(type(size) is int and 0 <= size < 2**62 for size in shape):
            raise PickleError("malformed: the shape of a numpy array")
        self.dtype, self.shape, self.is_fortran = dtype, shape, is_fortran
        self.content = bytes(content) if isinstance(content, bytes | bytearray) else None


@dataclass(eq=False)
class NumpyScalar:
    """A numpy scalar."""

    CALLED: ClassVar[str] = "a numpy scalar of objects or records"
    dtype: NumpyDType
    content: bytes

    def item(self) -> Any:
        """The Python value; of a type that is not a number, its bytes."""
        code = _SCALARS.get(self.dtype.text[1:])
        if code is None or len(self.content) != struct.calcsize(code):
            return self.content
        return struct.unpack(f"{'>' if self.dtype.text[0] == '>' else '<'}{code}", self.content)[0]


def _array(*_: Any) -> NumpyArray:
    return NumpyArray()


def _array_of_buffer(content: Any, dtype: Any, shape: Any, order: Any) -> NumpyArray:
    array = NumpyArray()
    array.fill(content, dtype, shape, order == "F")
    return array


def _scalar(dtype: Any, content: Any = None) -> NumpyScalar:
    if not isinstance(dtype, NumpyDType) or not isinstance(content, bytes):
        raise Unusual
    return NumpyScalar(dtype, content)


def _numpy_dtype(name: Any, *_: Any) -> NumpyDType:
    if not isinstance(name, str):
        raise Unusual
    return NumpyDType(name, f"|{name}")


def mapping(items: Any = ()) -> dict[Any, Any]:
    """A dict from another dict, or from pairs whose keys are quick to hash."""
    if isinstance(items, dict):
        return dict(items)
    return {hashable(key): value for key, value in items}


def _counter(items: Any = ()) -> collections.Counter[Any]:
    counter: collections.Counter[Any] = collections.Counter()
    dict.update(counter, mapping(items))
    return counter


def _default_dict(factory: Any = None, *items: Any) -> collections.defaultdict[Any, Any]:
    kind = _FACTORIES.get(factory.name) if isinstance(factory, Global) else None
    if factory is not None and kind is None:
        raise Unusual
    return collections.defaultdict(kind, mapping(*items))


def _deque(items: Any = (), maxlen: int | None = None) -> collections.deque[Any]:
    if not isinstance(items, list | tuple) or not isinstance(maxlen, int | None):
        raise Unusual
    return collections.deque(items, maxlen)


def _set(items: Any = ()) -> set[Any]:
    if not isinstance(items, list | tuple | set | frozenset):
        raise Unusual
    return {hashable(item) for item in items}


def _bytes(text: str = "", encoding: str = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "utf-8"):
        raise PickleError("malformed: bytes")
    return text.encode(encoding)


def _bytearray(content: Any = b"", *encoding: Any) -> bytearray:
    if isinstance(content, str):
        content = _bytes(content, *encoding)
    if not isinstance(content, bytes):  # a number would be a size
        raise PickleError("malformed: a bytearray")
    return bytearray(content)


def _with(kind: Callable[..., Any], *types_: type) -> Callable[..., Any]:
    """A class whose arguments must have one of these types."""

    def make(*args: Any) -> Any:
        if not all(isinstance(arg, types_) for arg in args):
            raise Unusual
        return kind(*args)

    return make


_SIZE = (int, type(None))
_DATE = (int, bytes, datetime.timezone)
_MAKERS: dict[str, Callable[..., Any]] = {
    "argparse.Namespace": _with(argparse.Namespace),
    "types.SimpleNamespace": _with(types.SimpleNamespace),
    "collections.OrderedDict": lambda items=(): collections.OrderedDict(mapping(items)),
    "collections.Counter": _counter,
    "collections.defaultdict": _default_dict,
    "collections.deque": _deque,
    "builtins.set": _set,
    "builtins.frozenset": lambda items=(): frozenset(_set(items)),
    "builtins.bytes": lambda: b"",
    "builtins.bytearray": _bytearray,
    "builtins.complex": _with(complex, int, float),
    "builtins.range": _with(range, int),
    "builtins.slice": _with(slice, *_SIZE),
    "_codecs.encode": _bytes,
    "datetime.date": _with(datetime.date, *_DATE),
    "datetime.datetime": _with(datetime.datetime, *_DATE),
    "datetime.time": _with(datetime.time, *_DATE),
    "datetime.timedelta": _with(datetime.timedelta, int),
    "datetime.timezone": _with(datetime.timezone, datetime.timedelta, str),
    **{
        f"{module}.{kind}": _with(getattr(pathlib, kind.replace("Windows", "PureWindows", 1)), str)
        for module in ("pathlib", "pathlib._local")
        for kind in ("PosixPath", "WindowsPath", "Path", "PurePath")
    },
    **{
        f"{module}.Pure{kind}": _with(getattr(pathlib, f"Pure{kind}"), str)
        for module in ("pathlib", "pathlib._local")
        for kind in ("PosixPath", "WindowsPath")
    },
    "numpy.dtype": _numpy_dtype,
    **{
        f"numpy.{core}.{name}": make
        for core in ("core", "_core")
        for name, make in {
            "multiarray._reconstruct": _array,
            "multiarray.scalar": _scalar,
            "numeric._frombuffer": _array_of_buffer,
        }.items()
    },
}


def _safe(make: Callable[..., Any]) -> Callable[..., Any]:
    def made(*args: Any) -> Any:
        try:
            return make(*args)
        except (TypeError, ValueError, ArithmeticError, NotImplementedError):
            raise Unusual from None

    return made


def known_globals() -> Mapping[str, Global]:
    """The globals that make plain values, by full name."""
    named = {name: name.rsplit(".", 1) for name in _MAKERS}
    return {
        name: Global(module, qualname, _safe(_MAKERS[name]))
        for name, (module, qualname) in named.items()
    }
