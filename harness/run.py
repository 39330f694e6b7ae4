"""A run from its config to its end, in named steps: task, engines, run directory, loop."""

import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from harness import distributed, startup
from harness.callbacks.moments import Callbacks
from harness.checkpoint import init_weights, resume
from harness.checkpoint.commit import name_newest
from harness.checkpoint.completeness import complete_saves
from harness.checkpoint.copies import Copies
from harness.checkpoint.downloads import download_newest, download_requested
from harness.checkpoint.dropped import read_dropped, remove_dropped
from harness.checkpoint.memory import Memory, open_memory
from harness.checkpoint.neighbours import Neighbours, renew_marks
from harness.checkpoint.remote_store import Store, open_store
from harness.checkpoint.resume_source import keep_requested
from harness.checkpoint.save import Saver
from harness.checkpoint.uploads import Uploads
from harness.checkpoint.verify_ahead import VerifyAhead
from harness.config import Config
from harness.control.commands import Interrupt
from harness.control.live import LiveConfig
from harness.control.signals import Signals
from harness.convert.run_checkpoints import linked_in
from harness.data.step_batches import StepBatches
from harness.data.task_loader import TaskLoader
from harness.data.train_batches import (
    may_be_uneven,
    train_batches,
    train_lengths,
)
from harness.distributed.failures import Failures, raise_lost_rank
from harness.engine.build import build_engines
from harness.engine.engines import Engines
from harness.epochs import with_steps
from harness.errors import TaskError, counted
from harness.evaluate import check_best_metric
from harness.health import oom, phases, watchdog
from harness.health.outcome import Outcome
from harness.logs import configure_logging, set_deepspeed_level
from harness.memory_files import memory_directory
from harness.metrics.closing import Closing
from harness.metrics.progress import Progress
from harness.metrics.recorder import Recorder
from harness.metrics.status import Status
from harness.run_control import find_commands, open_control
from harness.run_directory import RunDirectory
from harness.run_sinks import open_sinks, open_task_sinks
from harness.task import Task, check_eval_data, load_task
from harness.trainer import Trainer
from harness.wrapper import attention_backend
from harness.zero.parameters import full_numel
from harness.zero.startup import join

log = logging.getLogger(__name__)
log_warning = distributed.global_leader_only(log.warning)


def run(config: Config, began: float | None = None, owns_process: bool = False) -> int:
    """Trains what the config describes. Every rank calls it; it ends on all of them together.

    `began`: when this process did, in seconds since the epoch; by default now. For the ledger.
    `owns_process`: a hang may end this process; else it is only reported.

    Returns the exit code: 0, or 128 + the number of the signal that ended the run. Raises
    HarnessError, on all ranks, for what the user can fix; until models, data and checkpoint have
    been validated, nothing is written except to an earlier run's log and outcome.
    """
    began = began or time.time()
    with joined_world(config, owns_process):
        return run_in_world(config, began)


@contextmanager
def joined_world(config: Config, owns_process: bool) -> Iterator[None]:
    """Within the context this rank is in the world, and watched; as in `run`. Collective."""
    phases.begin()
    try:
        startup.check_open_files(config.data.workers)
        with raise_lost_rank(config.run.timeout_s), watchdog.watched(config, owns_process):
            distributed.init(config.run.timeout_s, join)
            try:
                watchdog.join()
                yield
            finally:
                distributed.shutdown()
    except Exception as error:
        Outcome.of(error).write()  # also without a run directory
        raise


def run_in_world(
    config: Config, began: float | None = None, build: Callable[[Config], Task] | None = None
) -> int:
    """`run`, once all ranks have joined the world. `build`: the task's, instead of its path's."""
    began = began or time.time()
    configure_logging()
    set_deepspeed_level(config.run.deepspeed_log)
    phases.begin()
    startup.warn_if_in_use(config.run_dir)
    startup.check_machine(config.data.workers)
    startup.check_ranks_alike(config)
    store = open_store(config)
    signals = Signals()
    failures = Failures(config.run.timeout_s, phases.file, phases.read)
    named = raise_lost_rank(config.run.timeout_s)  # while `failures` know the rank
    with signals.installed(), failures, named, ExitStack() as stack:
        in_memory = memory_directory(config.run_dir) / "checkpoints"
        ahead = VerifyAhead(config.run.resume, config.run_dir / "checkpoints", in_memory)
        stack.callback(ahead.close)
        with oom.explained(config, is_building=True):
            task, batches = build_task(config, build)
            stack.callback(batches.close)
            config = with_steps(config, task)
            engines = build_engines(task, config)
        stack.callback(engines.close)
        use_attention_backend(config, engines, stack)
        grammar = find_commands(task, engines, config)
        directory = stack.enter_context(RunDirectory(config))
        stack.enter_context(oom.explained(config))
        live, callbacks = LiveConfig(config), Callbacks(task.callbacks, bool(task.sinks))
        memory = open_memory(config, directory.disks)
        checkpoint, changes = _restore(
            *(config, directory, engines, batches, live, callbacks, store, ahead, memory)
        )
        directory.record_start(engines.global_step)
        _log_start(live, engines)
        copies = _copies(live, directory, store)
        saver = Saver(engines, batches, live, directory.disks, callbacks, copies, memory)
        stack.callback(saver.close)
        saver.begin(checkpoint, bool(changes))
        _copy_existing(copies, checkpoint, saver)
        step, steps = engines.global_step, live.config.run.steps
        status = Status(step, steps)
        sinks = open_sinks(config, step if checkpoint else -1, status, began, stack)
        closing = Closing(config, step)
        if distributed.is_global_leader():
            sinks.append(closing)
        sinks += open_task_sinks(task, config, callbacks, stack)
        is_shown = config.metrics.progress and distributed.is_global_leader()
        progress = Progress(step, steps, is_shown)
        stack.callback(progress.close)
        bus = open_control(grammar, engines, live, signals, status, stack)
        recorder = Recorder(sinks)
        if changes:
            recorder.event(step, "resume", f"from {checkpoint}\n{changes}")
        trainer = Trainer(
            *(live, task, engines, batches, saver, bus, recorder, callbacks, progress, status)
        )
        code = trainer.train()
        if memory is not None:
            memory.remove()
        outcome = _outcome(trainer, code)
        outcome.write()
        if distributed.is_global_leader():
            closing.log(outcome, linked_in(directory.checkpoints))
        phases.enter("end")
        return code


def _outcome(trainer: Trainer, code: int) -> Outcome:
    """How a run without an error has ended."""
    command, step = trainer.ending, trainer.engines.global_step
    if command is None:
        return Outcome("complete", code, f"all {step} steps are taken", step=step)
    if isinstance(command, Interrupt):
        return Outcome("signal", code, signal.Signals(command.signal).name, step=step)
    reason = trainer.ending_reason or f"the command {command.forms[0]}"
    return Outcome("quit", code, reason, step=step)


def _restore(
    config: Config,
    directory: RunDirectory,
    engines: Engines,
    batches: StepBatches,
    live: LiveConfig,
    callbacks: Callbacks,
    store: Store | None,
    ahead: VerifyAhead,
    memory: Memory | None,
) -> tuple[Path | None, str]:
    """Loads the run's starting point: a checkpoint, `init_from`, or the task's weights. Collective.

    Returns the checkpoint, if any, which is validated before the directory is created, and what of
    it was kept, if not all.
    """
    may_change = config.run.resume_changed == "fit"
    wanted, parent, disks = config.run.resume, directory.checkpoints, directory.disks
    dropped = read_dropped(parent, disks)
    if "://" in wanted:
        wanted = download_requested(wanted, parent, disks, store, dropped)
    dropped = keep_requested(wanted, parent, dropped, disks)
    remove_dropped(parent, dropped, disks)
    name_newest(parent, dropped, config.checkpoint, disks)
    if memory is not None:
        memory.forget(dropped)
    if wanted == "latest" and store is not None:
        download_newest(store, parent, disks, dropped, ahead.verify, memory)
    checkpoint = resume.choose_checkpoint(
        *(wanted, parent, engines, disks, ahead.verify, may_change, memory)
    )
    weights = init_weights.find_weights(engines, config.engines, resumes=checkpoint is not None)
    directory.create()
    # Different dropout on every rank.
    distributed.seed_everything(config.run.seed + distributed.global_rank())
    for name, loaded in weights.items():
        init_weights.load_weights(engines[name], loaded)
    changes = ""
    if memory is not None:
        memory.begin(directory.path, directory.disks, checkpoint)
    if checkpoint is not None:
        changes = resume.restore(checkpoint, engines, batches, live, callbacks, may_change)
    return checkpoint, changes


def _copies(live: LiveConfig, directory: RunDirectory, store: Store | None) -> list[Copies]:
    """The copies of this run's checkpoints in other places. Collective."""
    copies: list[Copies] = []
    renew_marks(directory.checkpoints, directory.disks)
    if live.config.checkpoint.replicas and directory.disks.count > 1:
        copies.append(Copies(Neighbours(directory.checkpoints, directory.disks)))
    elif live.config.checkpoint.replicas:
        log_warning("checkpoint.replicas: there are none, as all ranks share a disk")
    if store is not None:
        copies.append(Copies(Uploads(store, lambda: live.config.checkpoint)))
    return copies


def _copy_existing(copies: list[Copies], checkpoint: Path | None, saver: Saver) -> None:
    """Goes on with the copies of the newest checkpoint of an earlier start: of the one that the run
    resumes from, or of that on the disk if it resumes from memory. Collective."""
    if saver.begins_in_memory and copies:
        saves = complete_saves(saver.directory, saver.disks, saver.passed_over)
        checkpoint, _ = next(saves, (None, None))
    if checkpoint is not None and checkpoint.parent == saver.directory:
        for each in copies:
            each.add_existing(checkpoint)


def build_task(config: Config, build: Callable[[Config], Task] | None) -> tuple[Task, StepBatches]:
    """The task, and this rank's training data. Collective."""
    rank, world_size = distributed.global_rank(), distributed.world_size()
    with distributed.raise_on_all_ranks(f"task {config.task.path}"):
        distributed.seed_everything(config.run.seed)  # the same initial weights on every rank
        task = load_task(config, build)
        loader = train_batches(
            task.train_data, config.data, task.collate, config.run.seed, rank, world_size
        )
        oom.check_can_shrink(config, has_own_loader=isinstance(loader, TaskLoader))
        batches = StepBatches(loader, task.weigh, config.run.seed * world_size + rank)
        lengths = {**train_lengths(task.train_data), **check_eval_data(task, config)}
        lengths |= {"callbacks": len(task.callbacks), "sinks": len(task.sinks)}
        check_best_metric(config, task)
    per_rank = distributed.all_gather(lengths)
    if may_be_uneven(loader, [lengths.get("train_data") for lengths in per_rank]):
        batches.end_epochs_together(config.data.uneven)
    with distributed.raise_on_all_ranks(f"task {config.task.path}"):
        for what in dict.fromkeys(name for lengths in per_rank for name in lengths):
            by_rank = [lengths.get(what, "none") for lengths in per_rank]
            is_divided = what == "train_data" and isinstance(loader, TaskLoader)
            if len(set(by_rank)) > 1 and not is_divided:
                raise TaskError(f"{what} differs in length between the ranks: {by_rank}")
    return task, batches


def use_attention_backend(config: Config, engines: Engines, stack: ExitStack) -> None:
    """Makes models use the configured attention back end while the stack is open. Collective."""
    with distributed.raise_on_all_ranks("optimizations.attention"):
        dtypes = {engine.dtype for engine in engines.values()}
        backend = config.optimizations.attention
        stack.enter_context(attention_backend(backend, dtypes, distributed.device()))


def _log_start(live: LiveConfig, engines: Engines) -> None:
    for event in live.events.beyond(live.config.run.steps):
        log_warning("%s: the run ends before it, at step %d", event, live.config.run.steps)
    for name, engine in engines.items():
        parameters = sum(map(full_numel, engine.module.parameters()))
        log.info(
            "engine %s: %s parameters, %s, ZeRO stage %d, %s",
            name,
            f"{parameters:,}",
            engine.dtype,
            engine.zero_stage,
            engine.role,
        )
        settings = live.config.engines[name]
        if engine.role == "train" and "gradient_clipping" not in settings.deepspeed():
            log.info(
                "engine %s: gradients are clipped to the norm %g, DeepSpeed's default: "
                "gradient_clipping in %s sets another norm, or 0 for no clipping",
                name,
                engine.overrides.configured_clip,
                settings.ds_config or "ds_overrides",
            )
    log.info(
        "%s: step %d of %d on %s (%s), rank 0 on %s",
        live.config.run_dir,
        engines.global_step,
        live.config.run.steps,
        counted(distributed.world_size(), "rank"),
        distributed.device().type,
        socket.gethostname(),
    )
    for change in (*engines.describe_overrides(), *live.changes()):
        log.info("restored live change: %s", change)
