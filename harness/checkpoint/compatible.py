"""Whether a checkpoint fits the run: the same engines, optimizers and models."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from harness import distributed
from harness.checkpoint.files import reading
from harness.checkpoint.manifest import EngineManifest, Manifest
from harness.checkpoint.written import checkpoint_error_on_all_ranks
from harness.engine.engine import Engine
from harness.engine.engines import Engines
from harness.errors import CheckpointError, ConfigError, first_few
from harness.files import is_present
from harness.formats.dtypes import FLOATS
from harness.zero.entries import Entry, entries_of, file_of_entries, saved_entries
from harness.zero.layout import Shapes, layout_digest
from harness.zero.reader import SavedEngine

Entries = dict[str, Entry]


def engine_manifest(engine: Engine) -> EngineManifest:
    """An engine's entry in the manifest, the same on every rank. Collective.

    Raises CheckpointError, on all ranks, if the engine's layout is unknown.
    """
    trees = engine.collect().values() if engine.role == "train" else []
    digest_of_layout = ""
    with checkpoint_error_on_all_ranks(f"engine {engine.name!r}"):
        if trees and distributed.is_global_leader():
            digest_of_layout = layout_digest(trees)
    return EngineManifest(
        zero_stage=engine.zero_stage,
        dtype=str(engine.dtype),
        optimizer=engine.optimizer_path,
        layout=distributed.broadcast(digest_of_layout),
    )


def check_compatible(
    directory: Path, manifest: Manifest, engines: Engines, may_change: bool = False
) -> None:
    """Checks that a checkpoint was saved by the same engines and, unless it `may_change`, models,
    in any layout. Collective.

    Raises ConfigError, on all ranks; CheckpointError or FormatError if a file cannot be read.
    """
    with distributed.raise_on_all_ranks(f"cannot read checkpoint {directory}"):
        saved = _identity(manifest.engines)
        for what, current in _identity(engines).items():
            if saved[what] != current:
                raise ConfigError(
                    f"checkpoint {directory} does not match this run: {what} is {current} in this "
                    f"run, and {saved[what]} in the checkpoint: restore the old value, or start a "
                    "new run under another run.name, with engines.NAME.init_from of each engine "
                    "to begin with the saved weights"
                )
    changes = {} if may_change else changed_models(directory, manifest, engines)
    with distributed.raise_on_all_ranks(f"cannot read checkpoint {directory}"):
        for name, differences in changes.items():
            raise ConfigError(
                f"checkpoint {directory} does not match this run: the model of engine {name!r} has "
                "changed:\n" + "\n".join(differences) + "\nrestore the model, or set "
                "run.resume_changed = 'fit' to keep what fits and reset the rest, or start a new "
                f"run under another run.name, with engines.{name}.init_from to begin with the "
                "saved weights"
            )


def changed_models(directory: Path, manifest: Manifest, engines: Engines) -> dict[str, list[str]]:
    """How the models have changed since a checkpoint, a line for each kind of difference; only
    engines whose models have. Collective. Raises CheckpointError or FormatError if a file cannot be
    read."""
    changes = {e.name: _changes_of_model(directory, manifest, e) for e in engines.trained}
    return {name: differences for name, differences in changes.items() if differences}


def check_parameters(saved: SavedEngine, engine: Engine, shapes: list[Shapes]) -> None:
    """Checks that an engine's optimizer has the saved parameters, as a rewrite for another layout
    needs: also those of modules that read other names themselves.

    `shapes`: of the new layout (`layout.group_shapes`). Raises CheckpointError if they differ, or,
    unless its state can be moved, are in other parameter groups. Only DeepSpeed's stage 0 in fp32
    counts those without elements among them.
    """
    current, stored = (
        {name: Entry(tuple(size), "", True) for name, size in sizes.items() if size.numel()}
        for sizes in (dict(pair for group in shapes for pair in group.items()), saved.shapes)
    )
    if differences := _differences(stored, current, stored | current):
        raise CheckpointError(
            f"engine {engine.name!r}: the optimizer has other parameters than in the checkpoint, "
            "which cannot be rewritten for the layout of this run:\n" + "\n".join(differences)
        )
    moved = [
        name
        for number, names in enumerate(engine.parameter_names)
        for name in names
        if name in current and saved.group_of(name) != number
    ]
    if moved and not engine.can_regroup:
        raise CheckpointError(
            f"engine {engine.name!r}: these parameters are in other parameter groups than in the "
            f"checkpoint: {first_few(moved)}; the state of {engine.optimizer_path} cannot follow "
            "them: restore the old groups, or start a new run under another run.name"
        )


def _identity(engines: Mapping[str, Engine | EngineManifest]) -> dict[str, Any]:
    """What must be the same in the run and the checkpoint, by its name in messages."""
    facts: dict[str, Any] = {"engines": sorted(engines)}
    for name, engine in engines.items():
        facts[f"engine {name!r}: dtype"] = str(engine.dtype)
        is_engine = isinstance(engine, Engine)
        optimizer = engine.optimizer_path if is_engine else engine.optimizer
        facts[f"engine {name!r}: optimizer"] = optimizer
    return facts


def _changes_of_model(directory: Path, manifest: Manifest, engine: Engine) -> list[str]:
    current = _current_entries(engine)
    saved = _saved_entries(directory, manifest, engine.name)
    free = _prefixes_with_own_loading(engine.module)
    stepped = {n for entries in (saved, current) for n, e in entries.items() if e.is_trained}
    return _differences(
        saved, current, [n for n in saved | current if n in stepped or not n.startswith(free)]
    )


def _current_entries(engine: Engine) -> Entries:
    """The entries of a running engine. Collective."""
    models = [tree for tree in engine.collect().values() if "module" in tree]
    return distributed.broadcast(entries_of(models[0]) if models else {})


def _saved_entries(directory: Path, manifest: Manifest, engine: str) -> Entries:
    """The entries in an engine's files, read by the first rank that has the file. Collective."""
    name = file_of_entries(file for file in manifest.files if file.startswith(f"{engine}/"))
    doing = f"cannot read checkpoint {directory}"
    has_file = False
    with distributed.raise_on_all_ranks(doing), reading(directory):
        if name is None:
            raise CheckpointError(f"{directory}: no model_states of engine {engine!r}")
        has_file = is_present(directory / name)
    reader, _ = distributed.first_rank(has_file)
    assert reader is not None  # for the checkpoint is verified
    entries: Entries = {}
    with distributed.raise_on_all_ranks(doing), reading(directory):
        if distributed.global_rank() == reader and name is not None:
            entries = saved_entries(directory / name)
    return distributed.broadcast(entries, reader)


def _differences(saved: Entries, current: Entries, names: Collection[str]) -> list[str]:
    """What differs between the entries of these names, a line for each kind of difference."""
    both = [name for name in names if name in saved and name in current]
    found = {
        "only in this run": [name for name in names if name not in saved],
        "only in the checkpoint": [name for name in names if name not in current],
        "changed": [
            f"{name!r} has the {what} {new} in this run, and {old} in the checkpoint"
            for name in both
            for what, new, old in _changes(saved[name], current[name])
        ],
        "trained in this run, and not in the checkpoint": _stepped(both, current, saved),
        "trained in the checkpoint, and frozen or tied in this run": _stepped(both, saved, current),
    }
    return [f"  {what}: {first_few(names)}" for what, names in found.items() if names]


def _stepped(names: Collection[str], here: Entries, there: Entries) -> list[str]:
    """Names of those that the optimizer steps here only."""
    return [n for n in names if here[n].is_trained and there[n].is_trained is False]


def _changes(saved: Entry, current: Entry) -> Iterator[tuple[str, object, object]]:
    """`(what, new, old)` of shape and dtype, if the one cannot be loaded into the other."""
    if None not in (saved.shape, current.shape) and saved.shape != current.shape:
        yield "shape", current.shape, saved.shape
    dtypes = {saved.dtype, current.dtype}
    if len(dtypes) > 1 and not dtypes <= set(FLOATS):
        yield "dtype", current.dtype, saved.dtype


def _prefixes_with_own_loading(model: nn.Module) -> tuple[str, ...]:
    """Of the names of entries that the model's own code reads, also from other ones. It has no say
    in what the optimizer keeps, so that what this steps must be there by its name."""
    if type(model).load_state_dict is not nn.Module.load_state_dict:
        return ("",)
    return tuple(
        f"{path}." if path else ""
        for path, module in model.named_modules()
        if module._load_state_dict_pre_hooks
        or not type(module)._load_from_state_dict.__module__.startswith("torch.nn.")
    )
