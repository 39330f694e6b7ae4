"""The trees of tensors and plain values that a running DeepSpeed engine saves, and loads.

DeepSpeed writes and reads files. In place of its checkpoint engine, the functions here put others,
which keep or give the trees in memory (engine.py, `save_checkpoint` and `load_checkpoint`).
"""

import glob
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.zero import module_state
from harness.zero.layout import PARAMETER_NAMES, Tree

FileTrees = dict[str, Tree]
"""The files of a rank: trees of tensors and plain values, by path relative to the checkpoint."""

_MODEL = "model_states.pt"


def collect(
    ds: Any, name: str, parameter_names: list[list[str]], for_loading: bool = False
) -> FileTrees:
    """The trees that DeepSpeed would write for this rank, under `name/`, without writing them.

    The trees refer to the live tensors. `parameter_names`, by parameter group, are added: DeepSpeed
    records none at ZeRO 0. `for_loading`: those that this rank reads when it resumes, which below
    ZeRO 3 include the model's, that rank 0 writes. Collective.
    """
    collector = _Collector()
    names, writes_model = {PARAMETER_NAMES: parameter_names}, ds.save_non_zero_checkpoint
    ds._copy_recovery_script = lambda directory: None  # `zero_to_fp32.py` and the like
    try:
        with _checkpoint_engine(ds, collector):
            ds.save_non_zero_checkpoint = writes_model or for_loading
            ds.save_checkpoint(".", tag=name, client_state=names, save_latest=False)
    finally:
        ds.save_non_zero_checkpoint = writes_model
    return collector.trees


def load(ds: Any, directory: Path, name: str) -> None:
    """Loads what `collect` returned, from its files below `directory`. Collective.

    DeepSpeed looks for the model's file with glob: it is given a path in which `*`, `?` and `[`
    stand for themselves.
    """
    names = ds._get_all_ckpt_names
    with _checkpoint_engine(ds, _Reader(ds.checkpoint_engine)), module_state.loading(ds.module):
        ds._get_all_ckpt_names = lambda path, tag: names(glob.escape(path), glob.escape(tag))
        try:
            ds.load_checkpoint(str(directory), tag=name)
        finally:
            del ds._get_all_ckpt_names


def load_trees(ds: Any, trees: FileTrees, name: str) -> None:
    """Loads the trees of this rank, as of `collect` with `for_loading`, which the engine then owns.
    Collective."""
    with _checkpoint_engine(ds, _Giver(trees)), module_state.loading(ds.module):
        ds._get_all_ckpt_names = lambda path, tag: [os.devnull]  # it only has to exist
        try:
            ds.load_checkpoint(".", tag=name)
        finally:
            del ds._get_all_ckpt_names


@contextmanager
def _checkpoint_engine(ds: Any, replacement: Any) -> Iterator[None]:
    """In the block DeepSpeed writes and reads through another checkpoint engine."""
    own = ds.checkpoint_engine
    ds.checkpoint_engine = replacement
    try:
        yield
    finally:
        ds.checkpoint_engine = own


class _Collector:
    """Keeps the trees, and touches no disk."""

    def __init__(self) -> None:
        self.trees: FileTrees = {}

    def save(self, state_dict: Any, path: str) -> None:
        self.trees[str(Path(path))] = state_dict

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def create(self, info: Any) -> None:
        pass

    def commit(self, info: Any) -> bool:
        return True

    def is_decoupled(self) -> bool:
        return False

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        return dp_rank == 0

    def preserves_storage_sharing(self) -> bool:
        return True


class _Reader:
    """Reads the model's file once. DeepSpeed reads it twice (state_dict_factory.py): for the number
    of its parts, and to load it."""

    def __init__(self, own: Any):
        self._read: Callable[..., Tree] = own.load
        self._kept: FileTrees = {}

    def load(self, path: str, map_location: Any = None) -> Tree:
        if path in self._kept:
            return self._kept.pop(path)
        tree = self._read(path, map_location=map_location)
        if path.endswith(_MODEL):
            self._kept[path] = tree
        return tree


class _Giver:
    """Gives a rank's trees: the model's for its file, which DeepSpeed reads twice, and the
    optimizer's for any other."""

    def __init__(self, trees: FileTrees):
        self._model = next(tree for path, tree in trees.items() if path.endswith(_MODEL))
        self._optimizer = next((t for t in trees.values() if t is not self._model), {})

    def load(self, path: str, map_location: Any = None) -> Tree:
        return self._model if path == os.devnull else self._optimizer
