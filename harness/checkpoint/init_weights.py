"""Loads weights from files into a new engine, at every ZeRO stage: `init_from`.

A newly built engine is overwritten tensor by tensor: the model's weights, and the fp32 masters,
which are read from the files too, so that they are not rounded. Of sharded parameters a rank reads
only its own part.
"""

import logging
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import torch

from harness import distributed
from harness.config.engine_sections import EngineConfig
from harness.convert import plan
from harness.convert.resolve_source import Source, read_file, resolve_source
from harness.convert.run_checkpoints import is_step
from harness.engine.engine import Engine
from harness.engine.engines import Engines
from harness.engine.lora import base_weights
from harness.errors import ConfigError, FormatError, counted, did_you_mean, first_few
from harness.formats import tensor_file, tied_weights
from harness.formats.dtypes import FLOATS
from harness.formats.stored_tensor import StoredTensor
from harness.formats.tensor_file import is_extra_state
from harness.io.stored import GrownTensor, read_tensor
from harness.remote_path import as_path
from harness.task import FindWeights
from harness.utils import dtype_name
from harness.zero.engine_state import fill_masters, fill_weight, shapes_of
from harness.zero.parameters import full_shape, is_expert
from harness.zero.reader import SavedEngine, is_engine

log = logging.getLogger(__name__)

Weights = dict[str, StoredTensor | GrownTensor]
"""A source for entries of a model's state dict."""


def find_weights(
    engines: Engines, configs: Mapping[str, EngineConfig], resumes: bool
) -> dict[str, Weights]:
    """The weights to load, by engine: checked, but not read yet. Collective.

    If the run resumes, only those of teachers, which no checkpoint holds. Raises ConfigError, on
    all ranks, if a file does not have exactly the weights of its model, unless the task finds them
    by `Task.init_weights`; CheckpointError or FormatError if it cannot be read.
    """
    weights: dict[str, Weights] = {}
    for name, config in configs.items():
        if resumes and config.role != "teacher":
            continue
        path, find = config.init_from, engines.task.init_weights.get(name)
        if path is not None and find is None:
            path = _agreed(path, name)
        with distributed.raise_on_all_ranks(f"engines.{name}.init_from"):
            found = _find(engines[name], path, find)
            if found is not None:
                weights[name] = found
    return weights


def _agreed(path: Path, engine: str) -> Path:
    """What rank 0 takes of a directory: the run that it is of may save, or remove, the newest
    checkpoint while the ranks look for it. Collective. Raises as `read_weights`, on all ranks."""
    taken = str(path)
    with distributed.raise_on_all_ranks(f"engines.{engine}.init_from"):
        if distributed.is_global_leader() and path.is_dir():
            source = _resolve(path, engine)
            taken = str(source.directory if isinstance(source, SavedEngine) else source)
    return as_path(distributed.broadcast(taken))


def _find(engine: Engine, path: Path | None, find: FindWeights | None) -> Weights | None:
    if find is not None:
        found = find(engine.module, _entries(engine), path)
        return None if found is None else dict(found)
    return None if path is None else match_weights(engine, path)


def load_weights(engine: Engine, weights: Weights) -> None:
    """Overwrites the engine's weights and their masters with `weights`. Collective.

    Raises FormatError or HarnessError, on all ranks, if a file cannot be read.
    """
    shapes = []
    has_masters = engine.role == "train" and not engine.has_lora  # adapters are not among them
    if has_masters:
        shapes = shapes_of(engine.collect())

    def read_weight(name: str, start: int, stop: int) -> torch.Tensor:
        weight = weights[name]
        if isinstance(weight, GrownTensor):
            return weight.read(start, stop)
        return read_tensor(weight, start, stop).view(-1)

    with distributed.raise_on_all_ranks(f"engines.{engine.name}.init_from"):
        module = _entries(engine)
        for name, tensor in {id(t): (name, t) for name, t in module.items()}.values():
            if name in weights:
                fill_weight(tensor, name, read_weight)
        if has_masters:
            fill_masters(engine.ds, module, shapes, read_weight, names=weights)
    _log_casts(engine, module, weights)


def _log_casts(engine: Engine, module: Mapping[str, torch.Tensor], weights: Weights) -> None:
    names = [name for name in module if name in weights]
    loaded = {id(module[name]): name for name in names}
    casts: dict[str, int] = {}
    for name in loaded.values():
        if weights[name].dtype != dtype_name(module[name].dtype):
            text = f"{weights[name].dtype} to {dtype_name(module[name].dtype)}"
            casts[text] = casts.get(text, 0) + 1
    count = counted(len(loaded), "weight") + tied_weights.note(len(names) - len(loaded))
    cast = "".join(f"; {count} cast from {text}" for text, count in casts.items())
    log.info("engine %s: loaded %s from init_from%s", engine.name, count, cast)


def match_weights(engine: Engine, path: Path) -> Weights:
    """The weights at `path` under the names of the model. Raises as `find_weights` does."""
    weights = read_weights(path, engine.name)
    module = _entries(engine)
    if extra := [name for name in weights if is_extra_state(name)]:
        log.info("engine %s: extra state is ignored: %s", engine.name, ", ".join(map(repr, extra)))
        weights = {name: weight for name, weight in weights.items() if name not in extra}
    if any(map(is_expert, module.values())):
        raise ConfigError(f"engines.{engine.name}.init_from: not supported for DeepSpeed's experts")
    names: dict[int, list[str]] = {}
    for name, tensor in module.items():
        names.setdefault(id(tensor), []).append(name)
    matched: Weights = {}
    missing, wrong = [], []
    for tied in names.values():
        present = [name for name in tied if name in weights]
        if not present:
            missing.append(tied[0])
            continue
        matched |= dict.fromkeys(tied, weights[present[0]])
        for name in present:
            if text := _mismatch(module[name], weights[name]):
                wrong.append(f"{name!r} {text}")
            elif not _equal(weights[present[0]], weights[name]):
                wrong.append(
                    f"{name!r} differs from {present[0]!r}: tied in the model, but not in the file"
                )
    unexpected = [name for name in weights if name not in module]
    report = [
        *_report("missing", _with_nearest(missing, unexpected or weights)),
        *_report("unexpected", _with_nearest(unexpected, missing or module)),
        *_report("wrong", wrong),
    ]
    if report:
        raise ConfigError(
            f"engines.{engine.name}.init_from: {path} does not match the model:\n"
            + "\n".join(report)
            + "\n`harness convert` can write a matching file: --rename OLD=NEW, --exclude REGEX"
        )
    return matched


def read_weights(path: Path, engine: str) -> dict[str, StoredTensor]:
    """All weights at `path` by name; of several engines, those of this one. Raises CheckpointError
    or FormatError."""
    source = _resolve(path, engine)
    if isinstance(source, SavedEngine):
        return {
            name: planned.source
            for name, planned in plan.plan_weights(source, "fp32").tensors.items()
        }
    content = read_file(source)
    if content is None:
        keys = first_few([repr(key) for key in tensor_file.parts(source)])
        hint = f": `harness convert --key KEY` writes one of {keys} to a file" if keys else ""
        raise FormatError(f"{source}: expected weights by name, found other structures{hint}")
    for text in content.notes:
        _note(engine, text)
    return content.tensors


def _resolve(path: Path, engine: str) -> Source:
    return resolve_source(_in_exports(path, engine), None, engine, partial(_note, engine))


def _note(engine: str, text: str) -> None:
    log.info("engine %s: init_from: %s", engine, text)


def _in_exports(path: Path, engine: str) -> Path:
    """The engine's own in a directory of exports; of anything else, the path itself.

    Exports are in directories with the names of checkpoints. Of a checkpoint the engine's directory
    is not opened here: that it is complete is known only from its manifest. And nothing is looked
    for beside a file: a store may refuse that to whoever may only read objects.
    """
    for name in (f"{engine}.sft", f"{engine}.pt", engine) if path.is_dir() else ():
        is_saved = is_step(path) and is_engine(path / name)
        if (path / name).exists() and not is_saved:
            return path / name
    return path


def _entries(engine: Engine) -> dict[str, torch.Tensor]:
    """The parameters and persistent buffers by name, without adapters; tied ones are one tensor."""
    state = engine.module.state_dict(keep_vars=True)
    entries = {name: value for name, value in state.items() if not is_extra_state(name)}
    return base_weights(engine.module, entries) if engine.has_lora else entries


def _mismatch(tensor: torch.Tensor, weight: StoredTensor) -> str:
    """What is wrong with the shape or dtype of a weight; an empty string if it matches."""
    expected, shape = list(full_shape(tensor)), list(weight.shape)
    if expected != shape:
        return f"has the shape {shape} in the file, and {expected} in the model"
    dtypes = {weight.dtype, dtype_name(tensor.dtype)}
    if len(dtypes) > 1 and not dtypes <= set(FLOATS):
        return f"is {weight.dtype} in the file, and {dtype_name(tensor.dtype)} in the model"
    return ""


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    return one == other or torch.equal(read_tensor(one), read_tensor(other))


def _with_nearest(names: Iterable[str], known: Iterable[str]) -> list[str]:
    return [f"{name!r}{did_you_mean(name, known)}" for name in names]


def _report(what: str, texts: list[str], most: int = 10) -> list[str]:
    """Lines for the first `most` texts, and how many more there are."""
    more = [f"  ... and {len(texts) - most} more {what}"] if len(texts) > most else []
    return [f"  {what}: {text}" for text in texts[:most]] + more
