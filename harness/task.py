"""The task: the interface to the user's code.

A task is a Python file, or an importable module, with one function `build(config) -> Task`.
"""

import importlib
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn
from torch.utils.data import default_collate

from harness.callbacks import Callback
from harness.config import Config
from harness.control.commands import COMMANDS
from harness.data.held_out import check_held_out
from harness.errors import ConfigError, HarnessError, TaskError, is_out_of_memory
from harness.metrics.meters import Stats
from harness.metrics.sinks import Sink
from harness.utils import named_parts, tensor_leaves, to_device

FindWeights = Callable[[nn.Module, Mapping[str, torch.Tensor], Path | None], Any]
"""`Task.init_weights` of an engine."""
Export = Callable[[nn.Module, Mapping[str, torch.Tensor], Path], None]
"""`Task.exporters` of an engine."""


class FedEngine(Protocol):
    """The part of an `engine.engine.Engine` that the default feeder uses."""

    name: str

    @property
    def module(self) -> nn.Module: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def gather_attribute(self, name: str, kind: type = object) -> dict[str, Any]: ...


def default_feeder(engine: FedEngine, batch: Any) -> tuple[torch.Tensor, Stats]:
    """Calls the model with the batch and sums the losses of its submodules.

    A mapping (dict, UserDict) or dataclass is passed as keyword arguments, a list or tuple (also a
    named one) as positional arguments, anything else as the only argument. In forward any submodule
    may set `self.loss` (a scalar tensor) and `self.stats` (a dict of numbers); both are removed
    afterwards. If none sets `loss`, it is the output's: its attribute or key `loss`, as of Hugging
    Face models.
    """
    batch = to_device(batch, engine.device, engine.dtype)
    match batch:
        case Mapping():
            output = engine(**batch)
        case list() | tuple():
            output = engine(*batch)
        case _:
            parts = named_parts(batch)
            output = engine(batch) if parts is None else engine(**parts)
    losses = engine.gather_attribute("loss", torch.Tensor) or _loss_of(output)
    if not losses:
        raise TaskError(
            f"engine {engine.name!r}: forward set no `loss` on any submodule of "
            f"{type(engine.module).__name__}, and its output, {type(output).__name__}, has none: "
            "set `self.loss`, return it as `loss`, or set Task.feeder"
        )
    stats = (
        {f"loss.{path}": loss.detach() for path, loss in losses.items()} if len(losses) > 1 else {}
    )
    for reported in engine.gather_attribute("stats", Mapping).values():
        stats |= reported
    for path, loss in losses.items():
        if loss.ndim:
            raise TaskError(
                f"engine {engine.name!r}: the loss of {path or 'the model'} has shape "
                f"{list(loss.shape)}, expected a scalar"
            )
    return torch.stack(list(losses.values())).sum(), stats


def _loss_of(output: Any) -> dict[str, torch.Tensor]:
    """The loss in a model's output, like those of submodules: by path, here the model's."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return {"": loss} if isinstance(loss, torch.Tensor) else {}


def count_batch(batch: Any) -> tuple[int, int]:
    """`(samples, tokens)` of a batch, from its first tensor: [samples, tokens] or [samples, tokens,
    any] of integers, or [samples, tokens, features]. Any other has no tokens: images, numbers."""
    leaves = [leaf for leaf in tensor_leaves(batch) if leaf.ndim]
    if not leaves:
        return 1, 0
    first = leaves[0]
    has_tokens = first.ndim == 3 or (first.ndim == 2 and not first.is_floating_point())
    return first.shape[0], first.shape[0] * first.shape[1] if has_tokens else 0


@dataclass(kw_only=True)
class Task:
    """The user's models and data, and how to compute a loss from a batch."""

    models: Mapping[str, Any]
    """A model (nn.Module) for each `[engines.NAME]` of the config, by name; or a function without
    arguments
    that returns it. At ZeRO stage 3 what a function builds is sharded while it is built, so that no
    rank holds all of its weights. Functions are called in this order, from the run's seed on."""

    train_data: Any
    """A map-style dataset (`__len__`, `__getitem__`), or a dict of them, a mixture: split over the
    ranks. A stream of samples, with a length or without: an IterableDataset, or a function that
    returns an iterator; it yields this rank's samples, of which each of several `data.workers`
    yields a part (torch.utils.data.get_worker_info), or with `data.split = "stride"` all samples.
    Or a loader (`__iter__`) of this rank's batches. See docs/data.md: how each of them resumes."""

    eval_data: Any | None = None
    """Held-out data: a map-style dataset, which is split over the ranks; an IterableDataset of this
    rank's samples; an iterable of this rank's batches, which may end earlier than on other ranks;
    or a dict of such sets by name. None: no evaluation."""

    feeder: Callable[[Any, Any], tuple[torch.Tensor, Stats]] = default_feeder
    """`(engine, batch) -> (loss, stats)`: a scalar loss with its graph, and numbers to log."""

    evaluate: Callable[[Any, Any], Stats] | None = None
    """`(engine, batch) -> stats` for evaluation, under `no_grad`; default: the feeder. Stats are
    averaged over the set, weighted by samples, or by `weigh`; with `summarize` they are summed."""

    summarize: Callable[[dict[str, torch.Tensor]], Stats] | None = None
    """`sums -> numbers`, for metrics that are not means: what `evaluate` returned, numbers or
    tensors of any shape, summed elementwise over a set (float64, on the CPU), is made into the
    engine's metrics."""

    collate: Callable[[list[Any]], Any] = default_collate
    """Collates a list of samples into a batch."""

    count: Callable[[Any], tuple[int, int]] = count_batch
    """`batch -> (samples, tokens)`, for counters and throughput."""

    weigh: Callable[[Any], float] | None = None
    """`batch -> number`: of how many terms (like labels that count) the loss of a micro-batch is
    the mean. Default: micro-batches count alike."""

    init_weights: Mapping[str, FindWeights] = field(default_factory=dict)
    """Where the weights of a new engine are, by engine: `(model, entries, init_from) -> weights`.
    `entries` is its state dict, without adapters and maybe sharded; `init_from` is the config's, or
    None. Returned are stored tensors (`formats.stored_tensor`) by name, each of which is read on
    every rank in parts; an entry without one stays as built. None: all stay."""

    exporters: Mapping[str, Export] = field(default_factory=dict)
    """Writes an engine's exported weights, by engine, in place of ENGINE.sft:
    `(model, state, directory)`, on rank 0. `state` is the full state dict on the CPU, adapters
    merged; the model itself may be sharded; the directory, ENGINE, does not exist yet."""

    parameter_groups: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """Parameter groups by engine, like those of `[[engines.NAME.optimizer.groups]]`, which come
    first: `{"net": [{"name": "head", "match": "head", "lr": "x0.1"}]}`."""

    commands: Mapping[str, Callable[..., str | None]] = field(default_factory=dict)
    """The task's live commands, by name: `function(engines, *words) -> answer`. All ranks call it
    between the same two steps; `help` shows its docstring."""

    callbacks: Sequence[Callback] = ()
    """Called at a few moments of the run, in this order on every rank (docs/callbacks.md)."""

    sinks: Sequence[Sink | Callable[[Config], Sink]] = ()
    """Where rank 0 also writes all records: each with `write(record)` and `close()`, or functions
    `config -> sink`, which only rank 0 calls (docs/callbacks.md)."""


RESERVED = {
    *("step", "epoch", "loss", "lr", "grad_norm", "loss_scale", "skipped", "spikes"),
    *("samples", "skipped_samples", "tokens", "step_time_s", "tokens_per_s", "slowest_rank"),
    *("step_time_min_s", "step_time_mean_s", "step_time_max_s"),
}
"""Names of harness's own metrics."""


def feed(task: Task, engine: FedEngine, batch: Any) -> tuple[torch.Tensor, Stats]:
    """The feeder's loss and stats of a batch. Raises TaskError if they are not valid."""
    result = task.feeder(engine, batch)
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)):
        raise TaskError(f"the feeder returned {type(result).__name__}, expected (loss, stats)")
    loss, stats = result
    if not isinstance(loss, torch.Tensor) or loss.ndim:
        actual = list(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise TaskError(f"the feeder returned the loss {actual}, expected a scalar tensor")
    if reserved := RESERVED & stats.keys():
        raise TaskError(f"the feeder returned stats with reserved names: {sorted(reserved)}")
    return loss, checked_stats(stats, "the feeder")


def checked_stats(stats: Any, source: str) -> dict[str, torch.Tensor | float]:
    """`stats` as tensors and floats. Raises TaskError, about `source`, if one is not a number."""
    if not isinstance(stats, Mapping):
        raise TaskError(f"{source} returned {type(stats).__name__}, expected a dict of numbers")
    checked: dict[str, torch.Tensor | float] = {}
    for name, value in stats.items():  # tensors first: there may be hundreds in each micro-batch
        if isinstance(value, torch.Tensor) and not value.is_complex():
            # With its graph it would keep the activations until it is written.
            checked[name] = value.detach() if value.requires_grad else value
        elif isinstance(value, float | int | np.floating | np.integer | np.bool_):
            checked[name] = float(value)
        elif isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            checked[name] = torch.as_tensor(value)
        else:
            raise TaskError(f"{source} returned the stat {name!r} = {value!r}, expected a number")
    return checked


def validate(task: Any, path: str) -> Task:
    """What `build` returned. Raises TaskError if it is not a valid Task."""
    if not isinstance(task, Task):
        raise TaskError(f"task {path}: build returned {type(task).__name__}, expected Task")
    if not isinstance(task.models, Mapping):
        kind = type(task.models).__name__
        raise TaskError(f"task {path}: models is a {kind}, expected a dict of modules")
    for name, model in task.models.items():
        if not callable(model):  # as modules are, too
            kind = type(model).__name__
            raise TaskError(
                f"task {path}: model {name!r} is a {kind}, expected an nn.Module, or a function "
                "that returns one"
            )
    for key in ("init_weights", "exporters"):
        if unknown := sorted(getattr(task, key).keys() - task.models.keys()):
            raise TaskError(f"task {path}: {key}: there is no model {unknown[0]!r}")
    if task.summarize is not None and task.evaluate is None:
        raise TaskError(f"task {path}: summarize needs evaluate, which returns what is summed")
    for name in ("callbacks", "sinks"):
        if not isinstance(value := getattr(task, name), Sequence):
            raise TaskError(f"task {path}: {name}: found {value!r}, expected a list")
    for callback in task.callbacks:
        if not isinstance(callback, Callback):
            raise TaskError(
                f"task {path}: callbacks: found {callback!r}, expected a harness.Callback object"
            )
    for sink in task.sinks:
        if not (callable(sink) or isinstance(sink, Sink)):
            raise TaskError(
                f"task {path}: sinks: found {sink!r}, expected an object with write(record) and "
                "close(), or a function that returns one"
            )
    builtin = {form.split()[0] for command in COMMANDS for form in command.forms}
    for name, function in task.commands.items():
        if not (name.isidentifier() and callable(function)) or name in builtin:
            raise TaskError(
                f"task {path}: command {name!r}: expected a function, and an identifier that is "
                "not a built-in command"
            )
    return task


def check_eval_data(task: Task, config: Config) -> dict[str, int | None]:
    """The lengths of the held-out sets, by their names in messages; None: unknown.

    Raises ConfigError or TaskError if evaluations are configured without usable data.
    """
    for key in ("trainer.eval_every", "checkpoint.keep_best"):
        section, _, name = key.partition(".")
        if task.eval_data is None and getattr(getattr(config, section), name):
            raise ConfigError(f"{key} is set, but the task has no eval_data")
    return check_held_out(task.eval_data)


def load_task(config: Config, build: Callable[[Config], Task] | None = None) -> Task:
    """Imports the task's code, unless its function `build` is given, and builds the Task.

    Raises TaskError, with the task's traceback, if that fails or the Task is invalid.
    """
    path = config.task.path
    try:
        if build is None:
            build = getattr(_import_task(path), "build", None)
        if not callable(build):
            raise TaskError(f"task {path} has no function `build(config) -> Task`")
        return validate(build(config), path)
    except HarnessError:
        raise
    except ValidationError as error:
        lines = (f"  task.args.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"task {path}:\n" + "\n".join(lines)) from None
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error):
            raise
        frames = error.__traceback__.tb_next if error.__traceback__ else None
        text = "".join(traceback.format_exception(type(error), error, frames))
        raise TaskError(f"task {path} failed to build:\n{text}") from None


def _import_task(path: str) -> ModuleType:
    """Imports the task's module; for a file, with its folder on `sys.path`, as for a script.

    So it can import modules next to it, and data-loader workers can unpickle its classes.
    """
    if not path.endswith(".py"):
        return importlib.import_module(path)
    file = Path(path).resolve()
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    module = importlib.import_module(file.stem)
    if Path(module.__file__ or "").resolve() != file:
        raise TaskError(f"task {path}: another module is named {file.stem!r}: {module.__file__}")
    return module
