"""Small helpers that need no file of their own."""

import copy
import importlib
import io
import os
import pickle
from collections import UserDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from harness.errors import ConfigError, TaskError


def import_path(path: str) -> Any:
    """The object that an import path like "torch.nn:Linear" names. Raises ConfigError."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{path!r}: {error}") from None


def check_state(state: Any, name: str) -> None:
    """Raises TaskError if an object's state, called `name`, can be saved, but not loaded with
    weights_only."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    try:
        torch.load(file, weights_only=True)
    except pickle.UnpicklingError:
        raise TaskError(
            f"{name} must contain only tensors and plain values (no numpy values, for instance): "
            "otherwise a run could not resume"
        ) from None


def to_device(tree: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """The tree with every tensor on `device`, floating-point ones cast to `dtype` if not None.

    A tree is nested dicts (also UserDict, like transformers' BatchEncoding), lists, tuples (also
    named ones) and dataclasses; anything else in it, like None or a string, is kept as it is.
    """

    def move(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            cast = dtype if leaf.is_floating_point() else None
            return leaf.to(device=device, dtype=cast, non_blocking=True)
        named = named_parts(leaf)
        return leaf if named is None else _with_parts(leaf, tree_map(move, named))

    return tree_map(move, tree)


def tensor_leaves(tree: Any) -> list[torch.Tensor]:
    """The tensors of a tree, as of `to_device`, in order."""
    leaves: list[torch.Tensor] = []
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            leaves.append(leaf)
        elif (named := named_parts(leaf)) is not None:
            leaves += tensor_leaves(named)
    return leaves


def named_parts(value: Any) -> dict[str, Any] | None:
    """The items of a UserDict, or the fields of a dataclass; None for anything else."""
    if isinstance(value, UserDict):
        return value.data
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return None


def _with_parts(value: Any, parts: dict[str, Any]) -> Any:
    """A copy of a UserDict or dataclass, made without its `__init__`, with other parts."""
    copied = copy.copy(value)
    if isinstance(copied, UserDict):
        copied.data = parts
    else:
        for name, part in parts.items():
            object.__setattr__(copied, name, part)  # it may be frozen
    return copied


def flattened(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts with string keys, each with its keys joined with dots."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def may_overlap(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether two elements of a strided tensor may share memory; True in doubt."""
    end = 0
    for step, size in sorted(zip(stride, shape, strict=True)):
        if size > 1:
            if step <= end:
                return True
            end += step * (size - 1)
    return False


def write_durably(value: Any, path: Path, pickle_module: Any = pickle) -> None:
    """`torch_write`, then syncs the file to the disk. Raises OSError, which names `path`."""
    torch_write(value, path, pickle_module)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def torch_write(value: Any, path: Path, pickle_module: Any = pickle) -> None:
    """Writes with torch.save. Raises OSError, which names `path`, if that fails.

    When torch opens the file itself, its error hides the cause: a full disk is an "unexpected pos".
    """
    try:
        with path.open("wb") as file:
            torch.save(value, file, pickle_module)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from None


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype, like "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def enclosing_names(name: str) -> list[str]:
    """A parameter's name after those of the modules that contain it: "a.b.weight" gives "a", "a.b"
    and "a.b.weight"."""
    path = name.split(".")
    return [".".join(path[:count]) for count in range(1, len(path) + 1)]


def is_compiled(module: nn.Module) -> bool:
    """Whether a part of it is compiled by torch."""
    return any(getattr(each, "_compiled_call_impl", None) for each in module.modules())
