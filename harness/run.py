"""A run from its config to its end: the task, the engines, the run directory, the loop."""

import logging
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import getdoc
from pathlib import Path

from harness import distributed
from harness.checkpoint import init_weights, resume
from harness.checkpoint.disks import Disks, find_disks
from harness.checkpoint.retention import clean
from harness.checkpoint.save import Saver
from harness.config.config import Config
from harness.control.audit import Audit
from harness.control.bus import Bus
from harness.control.grammar import Grammar
from harness.control.live import Live
from harness.control.signals import Signals
from harness.control.socket import SocketFront
from harness.control.stdin import StdinFront
from harness.data.loader import Batches, train_batches
from harness.distributed.network import raise_lost_rank
from harness.engine.engines import Engines, build_engines
from harness.errors import ConfigError, HarnessError, TaskError
from harness.evaluate import check_eval_data
from harness.execute import answer
from harness.files import locked, toml_write
from harness.metrics.progress import Progress, configure_logging, log_to_file
from harness.metrics.sinks import JsonlSink, Sink, TensorBoardSink
from harness.metrics.status import Status
from harness.task import Task, load_task
from harness.trainer import Trainer
from harness.utils import flattened
from harness.wrapper.wrapper import attention

log = logging.getLogger(__name__)


def run(config: Config) -> int:
    """Trains what the config describes. Every rank calls it; it ends on all of them together.

    Returns the exit code: 0, or 128 + the number of the signal that ended the run. Raises
    HarnessError, on all ranks, for what the user can mend; until the models, the data and the
    checkpoint have proved good, nothing is written but an earlier run's log.
    """
    with raise_lost_rank(config.run.timeout_s):
        distributed.init(config.run.timeout_s)
        try:
            return run_in_world(config)
        finally:
            distributed.shutdown()


def run_in_world(config: Config) -> int:
    """What `run` does once all ranks have joined the world."""
    configure_logging()
    _compare(config)
    signals = Signals()
    with signals.heard(), ExitStack() as stack:
        task, batches = _build(config)
        stack.callback(batches.close)
        engines = build_engines(task, config)
        stack.callback(engines.close)
        with distributed.raise_on_all_ranks("optimizations.attention"):
            dtypes = {engine.dtype for engine in engines.values()}
            backend = config.optimizations.attention
            stack.enter_context(attention(backend, dtypes, distributed.device()))
        live = Live(config)
        checkpoint, weights, disks = _open_run_directory(config, engines, stack)
        rank = distributed.global_rank()
        distributed.seed_everything(config.run.seed + rank)  # other dropout on every rank
        for name, given in weights.items():
            init_weights.fill(engines[name], given)
        if checkpoint is not None:
            resume.resume(checkpoint, engines, batches, live)
        with distributed.raise_on_all_ranks(f"run directory {config.run_dir}"):
            if distributed.is_global_leader():
                write_config(config)
        _greet(live, engines)
        saver = Saver(engines, batches, live, disks)
        stack.callback(saver.close)
        step, steps = engines.global_step, live.config.run.steps
        status = Status(step, steps)
        helps = {name: getdoc(function) or "" for name, function in task.commands.items()}
        grammar = Grammar([engine.name for engine in engines.trained], helps)
        sinks: list[Sink] = []
        audit = None
        with distributed.raise_on_all_ranks(f"run directory {config.run_dir}"):
            if distributed.is_global_leader():
                sinks = _open_sinks(config, step if checkpoint else -1)
                audit = Audit(config.run_dir / "commands.jsonl")
        for sink in (*sinks, *([audit] if audit else [])):
            stack.callback(sink.close)
        progress = Progress(step, steps, config.metrics.progress and rank == 0)
        stack.callback(progress.close)
        ask = partial(answer, status=status, live=live, engines=engines, grammar=grammar)
        bus = Bus(grammar, signals, ask, audit)
        if distributed.is_global_leader():
            _open_fronts(config, bus, stack)
        trainer = Trainer(live, task, engines, batches, saver, bus, sinks, progress, status)
        return trainer.train()


def _compare(config: Config) -> None:
    """Raises ConfigError if the ranks were given different configs, but for paths. Collective.

    Each node may have read a file of its own; and DeepSpeed's JSON is another one.
    """
    mine = dict(flattened(config.model_dump()))
    for name, engine in config.engines.items():
        mine |= flattened(engine.deepspeed(), f"engines.{name}.ds_config ")
    every_rank = distributed.all_gather(mine)
    with distributed.raise_on_all_ranks("config"):
        for key in sorted(set().union(*every_rank)):
            found = [given.get(key) for given in every_rank]
            for rank, value in enumerate(found):
                if value != found[0] and not isinstance(value, Path):
                    raise ConfigError(
                        f"the ranks were given different configs: {key} is {value!r} on rank "
                        f"{rank}, and {found[0]!r} on rank 0"
                    )


def _build(config: Config) -> tuple[Task, Batches]:
    """The task, and this rank's training data. Collective."""
    rank, world_size = distributed.global_rank(), distributed.world_size()
    with distributed.raise_on_all_ranks(f"task {config.task.path}"):
        distributed.seed_everything(config.run.seed)  # the same initial weights on every rank
        task = load_task(config)
        batches = train_batches(
            task.train_data, config.data, task.collate, config.run.seed, rank, world_size
        )
        check_eval_data(task, config)
        lengths = {"train_data": len(task.train_data), "eval_data": len(task.eval_data or ())}
    every_rank = distributed.all_gather(lengths)
    with distributed.raise_on_all_ranks(f"task {config.task.path}"):
        for what in lengths:
            found = [lengths[what] for lengths in every_rank]
            if len(set(found)) > 1:
                raise TaskError(f"{what} differs in length between the ranks: {found}")
    return task, batches


def _open_run_directory(
    config: Config, engines: Engines, stack: ExitStack
) -> tuple[Path | None, dict[str, init_weights.Weights], Disks]:
    """Makes the run directory, on every disk, locks it, and logs into it. Collective.

    Returns the checkpoint to resume, the given weights that engines start from, and the disks.

    An earlier run's directory is locked before it is looked into, and its log says why it cannot be
    resumed; a new one is made once all has proved good.
    """
    directory = config.run_dir
    disks = find_disks(directory / "checkpoints")
    if disks.count > 1:
        log.info("%s lies on %d disks: each keeps what its ranks write", directory, disks.count)
    with distributed.raise_on_all_ranks(f"run directory {directory}"):
        is_known = directory.exists()
        if is_known and disks.is_leader:
            stack.enter_context(locked(directory / "control/lock"))
    with distributed.raise_on_all_ranks(f"run directory {directory}"):
        if is_known:
            _log_into(directory, config, stack)
    checkpoint = resume.choose(config.run.resume, directory / "checkpoints", engines, disks)
    weights = init_weights.find(engines, config.engines, resumes=checkpoint is not None)
    with distributed.raise_on_all_ranks(f"run directory {directory}"):
        if disks.is_leader:
            if not is_known:
                stack.enter_context(locked(directory / "control/lock"))
            clean(directory / "exports")
    with distributed.raise_on_all_ranks(f"run directory {directory}"):
        if not is_known:
            _log_into(directory, config, stack)
    return checkpoint, weights, disks


def _log_into(directory: Path, config: Config, stack: ExitStack) -> None:
    """Logs into the run directory while the stack is open, in the end why the run ended."""
    handler = log_to_file(directory / "log.txt")
    stack.callback(handler.close)
    stack.callback(logging.getLogger("harness").removeHandler, handler)
    stack.enter_context(_errors_told_to(handler))
    stack.enter_context(raise_lost_rank(config.run.timeout_s))


@contextmanager
def _errors_told_to(handler: logging.Handler) -> Iterator[None]:
    """Has log.txt say why the run ended: the terminal may be lost together with a node."""
    try:
        yield
    except Exception as error:
        trace = None if isinstance(error, HarnessError) else sys.exc_info()
        handler.handle(log.makeRecord(log.name, logging.ERROR, "", 0, str(error), (), trace))
        raise


def _open_fronts(config: Config, bus: Bus, stack: ExitStack) -> None:
    """Opens what commands come from; in the end the bus answers what is left before they close."""
    if config.control.socket:
        try:
            stack.callback(SocketFront(bus, config.run_dir).close)
        except OSError as error:  # a file system without sockets must not keep anyone from training
            log.warning("no socket in %s, so no `harness ctl`: %s", config.run_dir, error)
    stack.callback(bus.close)
    if config.control.stdin:
        stack.callback(StdinFront(bus).close)


def write_config(config: Config) -> None:
    """Writes the resolved config into the run directory, ready to be given to `--config`."""
    plain = config.model_dump()
    tables: dict[str, Mapping] = {k: v for k, v in plain.items() if k != "engines"}
    tables |= {f"engines.{name}": engine for name, engine in plain["engines"].items()}
    toml_write(tables, config.run_dir / "config.toml")


def _open_sinks(config: Config, step: int) -> list[Sink]:
    sinks: list[Sink] = [JsonlSink(config.run_dir / "metrics.jsonl", step)]
    if config.metrics.tensorboard:
        sinks.append(TensorBoardSink(config.run_dir / "tensorboard", step))
    return sinks


def _greet(live: Live, engines: Engines) -> None:
    for name, engine in engines.items():
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
        log.info(
            "engine %s: %s parameters, %s, ZeRO stage %d, %s",
            name,
            f"{parameters:,}",
            engine.dtype,
            engine.zero_stage,
            engine.role,
        )
    log.info(
        "%s: step %d of %d on %d ranks (%s), rank 0 on %s",
        live.config.run_dir,
        engines.global_step,
        live.config.run.steps,
        distributed.world_size(),
        distributed.device().type,
        socket.gethostname(),
    )
    for change in (*engines.overrides(), *live.describe()):
        log.info("set live before: %s", change)
