"""The task: everything that harness knows about the user's code.

A task is a Python file, or an importable module, with one function `build(config) -> Task`.
"""

import importlib
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from pydantic import ValidationError
from torch import nn
from torch.utils.data import default_collate

from harness.config import Config
from harness.control.commands import COMMANDS
from harness.errors import ConfigError, HarnessError, TaskError
from harness.metrics.meters import Stats
from harness.utils import tensor_leaves, to_device


class FedEngine(Protocol):
    """What the default feeder uses of an engine; feeders get an `engine.engine.Engine`."""

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

    A dict is passed as keywords, a list or tuple as positional arguments. In its forward every
    submodule may set `self.loss` (a scalar tensor) and `self.stats` (a dict of numbers); both are
    removed again.
    """
    batch = to_device(batch, engine.device, engine.dtype)
    match batch:
        case Mapping():
            engine(**batch)
        case list() | tuple():
            engine(*batch)
        case _:
            engine(batch)
    losses = engine.gather_attribute("loss", torch.Tensor)
    if not losses:
        raise TaskError(
            f"engine {engine.name!r}: its forward set no `loss` on any submodule of "
            f"{type(engine.module).__name__}; set `self.loss`, or give the Task a feeder"
        )
    stats = (
        {f"loss.{path}": loss.detach() for path, loss in losses.items()} if len(losses) > 1 else {}
    )
    for reported in engine.gather_attribute("stats", Mapping).values():
        stats |= reported
    for path, loss in losses.items():
        if loss.ndim:
            raise TaskError(
                f"engine {engine.name!r}: the loss of {path or 'the model'} has the shape "
                f"{list(loss.shape)}, expected a scalar"
            )
    return torch.stack(list(losses.values())).sum(), stats


def count_batch(batch: Any) -> tuple[int, int]:
    """`(samples, tokens)` of a batch, from its first tensor's shape, [samples, tokens, ...]."""
    leaves = [leaf for leaf in tensor_leaves(batch) if leaf.ndim]
    if not leaves:
        return 1, 1
    shape = leaves[0].shape
    return shape[0], shape[0] * (shape[1] if len(shape) > 1 else 1)


@dataclass(kw_only=True)
class Task:
    """The user's models and data, and how a batch becomes a loss."""

    models: Mapping[str, nn.Module]
    """One model for every `[engines.NAME]` of the config, under the same name."""

    train_data: Any
    """A map-style dataset (`__len__`, `__getitem__`), or a loader (`__len__`, `__iter__`) that
    gives this rank its own batches."""

    eval_data: Any | None = None
    """Held-out data: a map-style dataset, or None for a run without evaluation."""

    feeder: Callable[[Any, Any], tuple[torch.Tensor, Stats]] = default_feeder
    """`(engine, batch) -> (loss, stats)`: a scalar loss with its graph, and numbers to log."""

    evaluate: Callable[[Any, Any], Stats] | None = None
    """`(engine, batch) -> stats` for evaluation; by default the feeder, under `no_grad`."""

    collate: Callable[[list[Any]], Any] = default_collate
    """Makes a batch from a list of samples."""

    count: Callable[[Any], tuple[int, int]] = count_batch
    """`batch -> (samples, tokens)`, for the counters and the throughput."""

    commands: Mapping[str, Callable[..., str | None]] = field(default_factory=dict)
    """The task's own live commands, by name: `function(engines, *words) -> answer`, which every
    rank calls between the same two steps. Its docstring is shown by `help`."""


RESERVED = {
    *("step", "epoch", "loss", "lr", "grad_norm", "loss_scale"),
    *("samples", "tokens", "step_time_s", "tokens_per_s"),
}
"""Names that harness itself uses in the metrics."""


def feed(task: Task, engine: FedEngine, batch: Any) -> tuple[torch.Tensor, Stats]:
    """The feeder's loss and stats of a batch. Raises TaskError if they are not valid."""
    result = task.feeder(engine, batch)
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)):
        raise TaskError(f"the feeder returned {type(result).__name__}, expected (loss, stats)")
    loss, stats = result
    if not isinstance(loss, torch.Tensor) or loss.ndim:
        found = list(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise TaskError(f"the feeder returned the loss {found}, expected a scalar tensor")
    if reserved := RESERVED & stats.keys():
        raise TaskError(f"the feeder returned stats named {sorted(reserved)}: reserved names")
    for name, value in stats.items():
        if not isinstance(value, torch.Tensor | float | int):
            raise TaskError(f"the feeder returned the stat {name!r} = {value!r}, expected a number")
    return loss, stats


def validate(task: Any, path: str) -> Task:
    """What `build` returned. Raises TaskError if it is not a valid Task."""
    if not isinstance(task, Task):
        raise TaskError(f"task {path}: build returned {type(task).__name__}, expected Task")
    if not isinstance(task.models, Mapping):
        found = type(task.models).__name__
        raise TaskError(f"task {path}: models is a {found}, expected a dict of name and module")
    for name, model in task.models.items():
        if not isinstance(model, nn.Module):
            found = type(model).__name__
            raise TaskError(f"task {path}: model {name!r} is a {found}, expected an nn.Module")
    own = {form.split()[0] for command in COMMANDS for form in command.forms}
    for name, function in task.commands.items():
        if not (name.isidentifier() and callable(function)) or name in own:
            raise TaskError(
                f"task {path}: command {name!r}: expected a function named by an identifier that "
                "is not one of harness's own commands"
            )
    return task


def load_task(config: Config) -> Task:
    """Imports the task's code and builds the Task.

    Raises TaskError, with the traceback of the task's own frames, if that fails or the Task is
    invalid.
    """
    path = config.task.path
    try:
        module = _import_task(path)
        build = getattr(module, "build", None)
        if not callable(build):
            raise TaskError(f"task {path} has no function `build(config) -> Task`")
        return validate(build(config), path)
    except HarnessError:
        raise
    except ValidationError as error:
        lines = (f"  task.args.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"task {path}:\n" + "\n".join(lines)) from None
    except (Exception, SystemExit) as error:
        frames = error.__traceback__.tb_next if error.__traceback__ else None
        text = "".join(traceback.format_exception(type(error), error, frames))
        raise TaskError(f"task {path} failed to build:\n{text}") from None


def _import_task(path: str) -> ModuleType:
    """Imports the task's module; of a file, with its folder on `sys.path`, as Python runs a script.

    So it can import its neighbours, and data-loader workers can unpickle what it defines.
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
