"""A run from its config to its end: the task, the engines, the run directory, the loop."""

import logging
from collections.abc import Mapping

from harness import distributed
from harness.checkpoint import resume
from harness.checkpoint.retain import clean
from harness.checkpoint.save import Saver
from harness.config import Config
from harness.control.bus import Bus
from harness.control.fronts import StdinFront
from harness.data import train_batches
from harness.engines import Engines, build_engines
from harness.errors import ConfigError, TaskError
from harness.io import toml_write
from harness.metrics.progress import Progress, log_to, show_log
from harness.metrics.sinks import JsonlSink, Sink, TensorBoardSink
from harness.task import Task, load_task
from harness.train import Trainer

log = logging.getLogger(__name__)


def run(config: Config) -> None:
    """Trains what the config describes. Every rank calls it; it ends on all of them together.

    Raises HarnessError, on all ranks, for what the user can mend; until the models, the data and
    the checkpoint have proved good, nothing is written.
    """
    distributed.init(config.run.timeout_s)
    try:
        train(config)
    finally:
        distributed.shutdown()


def train(config: Config) -> None:
    """What `run` does once all ranks have joined the world."""
    show_log()
    rank, world_size = distributed.global_rank(), distributed.world_size()
    with distributed.in_unison(f"task {config.task.path}"):
        distributed.seed_everything(config.run.seed)  # the same initial weights on every rank
        task = load_task(config)
        batches = train_batches(
            task.train_data, config.data, task.collate, config.run.seed, rank, world_size
        )
        check_eval_data(task, config)
        lengths = {"train_data": len(task.train_data), "eval_data": len(task.eval_data or ())}
    every_rank = distributed.all_gather(lengths)
    with distributed.in_unison(f"task {config.task.path}"):
        for what in lengths:
            found = [lengths[what] for lengths in every_rank]
            if len(set(found)) > 1:
                raise TaskError(f"{what} differs in length between the ranks: {found}")
    engines = build_engines(task, config)
    checkpoint = resume.choose(config.run.resume, config.run_dir / "checkpoints", engines)
    with distributed.in_unison(f"run directory {config.run_dir}"):
        if distributed.is_global_leader():
            config.run_dir.mkdir(parents=True, exist_ok=True)
            clean(config.run_dir / "exports")
    with distributed.in_unison(f"run directory {config.run_dir}"):
        file_handler = log_to(config.run_dir / "log.txt")
    distributed.seed_everything(config.run.seed + rank)  # other dropout on every rank
    if checkpoint is not None:
        resume.resume(checkpoint, engines, batches, config.run.seed)
    with distributed.in_unison(f"run directory {config.run_dir}"):
        if distributed.is_global_leader():
            write_config(config)
    _greet(config, engines)
    saver = Saver(engines, batches, config)
    bus = Bus()
    is_reading = config.control.stdin and distributed.is_global_leader()
    stdin = StdinFront(bus.submit) if is_reading else None
    step = engines.global_step
    sinks = (
        _open_sinks(config, step if checkpoint else -1) if distributed.is_global_leader() else []
    )
    progress = Progress(step, config.run.steps, config.metrics.progress and rank == 0)
    try:
        Trainer(config, task, engines, batches, saver, bus, sinks, progress).run()
    finally:
        if stdin is not None:
            stdin.close()
        saver.close()
        progress.close()
        for sink in sinks:
            sink.close()
        logging.getLogger("harness").removeHandler(file_handler)
        batches.close()
        engines.close()


def check_eval_data(task: Task, config: Config) -> None:
    """Raises TaskError or ConfigError if there is nothing to evaluate on where there should be."""
    if task.eval_data is None:
        if config.trainer.eval_every:
            raise ConfigError("trainer.eval_every is set, but the task has no eval_data")
    elif not (hasattr(task.eval_data, "__getitem__") and hasattr(task.eval_data, "__len__")):
        raise TaskError("eval_data is no map-style dataset (`__len__` and `__getitem__`)")
    elif len(task.eval_data) == 0:
        raise TaskError(f"eval_data: {type(task.eval_data).__name__} has no items")


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


def _greet(config: Config, engines: Engines) -> None:
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
        "%s: step %d of %d on %d ranks (%s)",
        config.run_dir,
        engines.global_step,
        config.run.steps,
        distributed.world_size(),
        distributed.device().type,
    )
