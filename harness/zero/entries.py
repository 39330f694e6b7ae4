"""The entries of a model's state dict, of a running engine and of its files alike: both are trees
of DeepSpeed's model_states."""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from harness.formats import pt_reader
from harness.formats.tensor_file import is_extra_state
from harness.zero.layout import PARAMETER_NAMES, Tree, group_shapes

_OF_RANK_0 = re.compile(r"(?:zero_pp_rank_0_)?mp_rank_00_model_states\.pt")


class Entry(NamedTuple):
    """What a checkpoint must have in common with the model that it is loaded into."""

    shape: tuple[int, ...] | None
    """None if it is not recorded: of extra state, and of a further name of a sharded parameter."""
    dtype: str
    """Without "torch."; "" of extra state."""
    is_trained: bool | None
    """Whether the optimizer steps it, under this name; None if it has no elements, or if that is
    not recorded."""


def file_of_entries(files: Iterable[str]) -> str | None:
    """The one of an engine's files with all entries: rank 0's model_states."""
    return next((name for name in files if _OF_RANK_0.fullmatch(Path(name).name)), None)


def saved_entries(path: Path) -> dict[str, Entry]:
    """The entries in such a file. No tensor is read. Raises FormatError or OSError."""
    return entries_of(pt_reader.read(path))


def entries_of(model: Tree) -> dict[str, Entry]:
    """The entries of rank 0's tree of model_states by name, except those of DeepSpeed's experts."""
    has_names = model["param_shapes"] is not None or PARAMETER_NAMES in model
    groups = group_shapes(model) if has_names else []
    trained = {name: tuple(shape) for group in groups for name, shape in group.items()}
    frozen = model["frozen_param_shapes"] or {}
    recorded = {name: tuple(shape) for name, shape in frozen.items()} | trained

    def entry(name: str, tensor: Any) -> Entry:
        if is_extra_state(name):
            return Entry(None, "", None)
        shape = recorded.get(name)
        if shape is None and (tensor.numel() or name in model["buffer_names"]):
            shape = tuple(tensor.shape)
        is_known = has_names and (shape is None or math.prod(shape) > 0)
        dtype = str(tensor.dtype).removeprefix("torch.")
        return Entry(shape, dtype, name in trained if is_known else None)

    return {name: entry(name, tensor) for name, tensor in model["module"].items()}
