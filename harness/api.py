"""`harness.train`: a run in somebody else's program, a notebook or a test, as one call."""

import os
import secrets
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import distributed, process_state
from harness.config import Config
from harness.config.load import Layer, name_of, read, resolve
from harness.config.overrides import dotted_overrides
from harness.config.paths import expand_path
from harness.config.sections import merge
from harness.errors import ConfigError
from harness.health.outcome import forget_of_environment
from harness.launcher import environment, parent
from harness.result import Result, result_of
from harness.run import joined_world, run_in_world
from harness.task import Task

Build = Callable[[Config], Task]
AnyConfig = Config | Mapping[str, Any] | str | Path | Sequence[str | Path]
AnyTask = Task | Build | str | Path


def train(
    config: AnyConfig, task: AnyTask | None = None, overrides: Mapping[str, Any] | None = None
) -> Result:
    """Trains, and returns when the run has ended; in a plain process, on every rank that a launcher
    started, in a notebook, in a test.

    `config`: nested tables as in a TOML file, or the path of one, or several, the later over the
    earlier; or a `Config`. `task`: a `Task`, a function `build(config) -> Task`, or the path of a
    file that has one; by default the config's `[task]`. `overrides`: settings over those of
    `config`, nested or with dotted keys: `{"run.steps": 100}`.

    Without `run.name` every call is a new run, with a name of its own; with one, the run resumes
    from its newest checkpoint. Standard input is read for commands only if `control.stdin` is set.
    Raises HarnessError, on all ranks, with the message that the command line would print. A signal
    saves and ends the run, and is then raised again, Ctrl-C as KeyboardInterrupt. Environment
    variables, signal handlers and random generators are as before afterwards.
    """
    began = time.time()
    with process_state.one_run(), process_state.restored():
        parent.parent_ids()  # while all launchers are alive
        environment.set_rank_variables()
        if os.environ.get("LOCAL_RANK", "0") == "0":
            forget_of_environment()
        if not isinstance(overrides or {}, Mapping):
            raise ConfigError(f"overrides: found {overrides!r}, expected tables")
        over = dotted_overrides(overrides or {})
        if isinstance(task, str | Path):
            over, task = merge(over, {"task": {"path": str(task)}}), None
        settings, name = _config(config, over)
        settings, build = _with_task(settings, task)
        with joined_world(settings, owns_process=False):
            run = {"name": settings.run.name or distributed.broadcast(_fresh_name(name))}
            settings = settings.model_copy(update={"run": settings.run.model_copy(update=run)})
            code = run_in_world(settings, began, build)
            result = result_of(settings)
    if code > 128:
        signal.raise_signal(code - 128)
    return result


def _config(config: AnyConfig, overrides: Mapping[str, Any]) -> tuple[Config, str]:
    """The config, and what a run without a name is called after. Raises ConfigError."""
    name, title = "run", "config"
    if isinstance(config, Config):
        layers = [Layer(config.model_dump(exclude_unset=True), "config")]
    elif isinstance(config, Mapping):
        layers = [Layer(config, "config")]
    else:
        paths = [config] if isinstance(config, str | Path) else config
        if not paths or not isinstance(paths, Sequence):
            raise ConfigError(f"config: found {config!r}, expected tables, a Config, or paths")
        try:
            expanded = [Path(expand_path(str(path))) for path in paths]
        except ValueError as error:
            raise ConfigError(f"config: {error}") from None
        layers = [layer for path in expanded for layer in read(path)]
        name, title = name_of(Path(paths[-1])), f"config {paths[-1]}"
    found = resolve(layers, title, Layer(overrides, "overrides"))
    if "stdin" not in found.control.model_fields_set:
        control = found.control.model_copy(update={"stdin": False})
        found = found.model_copy(update={"control": control})
    return found, name


def _with_task(config: Config, task: Task | Build | None) -> tuple[Config, Build | None]:
    """The config that names the task, and the task's function, unless it is in a file."""
    if task is None:
        if not config.task.path:
            raise ConfigError("config: task.path: missing, and no task is given")
        return config, None
    if not (callable(task) or isinstance(task, Task)):
        raise ConfigError(
            f"task: found {task!r}, expected a Task, a function build(config) -> Task, or a path"
        )
    build = (lambda config: task) if isinstance(task, Task) else task
    path = f"{build.__module__}:{getattr(build, '__qualname__', type(build).__name__)}"
    if isinstance(task, Task):
        path = "given:Task"
    given = config.task.model_copy(update={"path": path})
    return config.model_copy(update={"task": given}), build


def _fresh_name(name: str) -> str:
    """A name that no run has had, in the order of time."""
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
