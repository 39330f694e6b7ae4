"""Where a program makes the host wait for a device: on a GPU as torch warns of it, on a CPU by the
operations that would. And where it launches kernels."""

import importlib.util
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.fake_cuda import NO_KERNELS, READS, launches_of

PACKAGES = [
    Path(spec.origin).parent
    for name in ("harness", "deepspeed")
    if (spec := importlib.util.find_spec(name)) is not None and spec.origin
]

WARNING = "called a synchronizing CUDA operation"
"""How torch warns of a wait (c10/cuda/CUDAFunctions.cpp)."""
NOTICE = "Synchronization debug mode is a prototype feature"
"""How it warns, once, of these warnings."""


@contextmanager
def counted_waits() -> Iterator[Counter[str]]:
    """How often each function in harness or DeepSpeed waits inside the context: "harness/a.py:f" or
    "deepspeed/a.py:f", whichever is the innermost."""
    found: Counter[str] = Counter()
    if not torch.cuda.is_available():
        with _Reads(found):
            yield found
        return
    show = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")

        def note(message: Any, *args: Any, **kwargs: Any) -> None:
            if WARNING in str(message):
                found[_caller(sys._getframe(1))] += 1
            elif NOTICE not in str(message):
                show(message, *args, **kwargs)

        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


@contextmanager
def counted_launches() -> Iterator[Counter[str]]:
    """How many kernels each function launches, named as by `counted_waits`. By torch's operations,
    so that those on tensors of the host count too."""
    found: Counter[str] = Counter()
    with _Launches(found):
        yield found


class _Counted(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if count := self.count(func.__name__.partition(".")[0], args):
            self._found[_caller(sys._getframe(1))] += count
        return func(*args, **(kwargs or {}))

    def count(self, name: str, args: Any) -> int:
        """Of an operation."""
        raise NotImplementedError


class _Reads(_Counted):
    def count(self, name: str, args: Any) -> int:
        return name in READS


class _Launches(_Counted):
    def count(self, name: str, args: Any) -> int:
        return 0 if name in NO_KERNELS or name in READS else launches_of(name, args)


def _caller(frame: FrameType | None) -> str:
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        for package in PACKAGES:
            if path.is_relative_to(package):
                return f"{path.relative_to(package.parent)}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


class Waits(TorchDispatchMode):
    """Names the operations that make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.partition(".")[0] in ("_local_scalar_dense", "is_nonzero", "nonzero"):
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))
