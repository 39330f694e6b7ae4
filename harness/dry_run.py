"""`launch/train.py --dry-run`: a run is built and takes one step, and nothing is written."""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from statistics import fmean
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from harness import distributed, startup
from harness.config import Config
from harness.data.step_batches import StepBatches
from harness.engine.build import build_engines
from harness.engine.engine import Engine
from harness.engine.engines import Engines
from harness.epochs import with_steps
from harness.errors import ConfigError, counted
from harness.files import toml_text
from harness.logs import configure_logging, set_deepspeed_level
from harness.run import build_task, joined_world, use_attention_backend
from harness.sizing.memory import Footprint
from harness.sizing.setting import Setting
from harness.sizing.sources import Subject, of_task, setting_of
from harness.sizing.text import readable
from harness.task import Task
from harness.utils import to_device
from harness.zero.parameters import full_numel

STAGES = (0, 1, 2, 3)
PARTS = ("weights", "gradients", "masters", "optimizer", "activations")


def dry_run(config: Config, began: float | None = None, owns_process: bool = False) -> int:
    """Builds what the config describes, on all ranks, and takes one step; shows config, batch,
    parameters, memory by ZeRO stage and losses. No checkpoint is read, and nothing is written.

    Every rank calls it, as `run.run`. Returns 0. Raises HarnessError, on all ranks, for what the
    user can fix.
    """
    with joined_world(config, owns_process):
        for line in tried(config):
            if distributed.is_global_leader():
                sys.stdout.write(f"{line}\n")
                sys.stdout.flush()
    return 0


def tried(config: Config) -> Iterator[str]:
    """The lines of `dry_run`, once all ranks have joined the world. Collective."""
    configure_logging()
    set_deepspeed_level(config.run.deepspeed_log)
    startup.check_machine(config.data.workers)
    startup.check_ranks_alike(config)
    yield from _config_lines(config)
    with ExitStack() as stack:
        task, batches = build_task(config, None)
        stack.callback(batches.close)
        config = with_steps(config, task)
        with distributed.raise_on_all_ranks("memory by ZeRO stage"):
            memory = list(_memory_lines(config, task)) if distributed.is_global_leader() else []
        engines = build_engines(task, config)
        stack.callback(engines.close)
        use_attention_backend(config, engines, stack)
        for engine in engines.values():
            yield from _parameter_lines(engine)
        yield from memory
        distributed.seed_everything(config.run.seed + distributed.global_rank())
        yield from _step_lines(task, engines, batches)
    yield f"nothing was written: {config.run_dir} is as it was"


def _config_lines(config: Config) -> Iterator[str]:
    """The config without its defaults."""
    yield f"run {config.run.name!r} on {counted(distributed.world_size(), 'rank')}, by the config:"
    plain = config.model_dump(exclude_defaults=True)
    tables = {key: table for key, table in plain.items() if key != "engines"}
    tables |= {f"engines.{name}": table for name, table in plain["engines"].items()}
    for line in toml_text(tables).splitlines():
        yield f"  {line}".rstrip()


def _parameter_lines(engine: Engine) -> Iterator[str]:
    """Parameters of each child of the model."""
    model = engine.module
    parts = {name: list(child.parameters()) for name, child in model.named_children()}
    parts["(its own)"] = list(model.parameters(recurse=False))
    total, trained = _numel(list(model.parameters()))
    yield ""
    yield f"engine {engine.name}: {total:,} parameters, {trained:,} trained"
    for name, parameters in parts.items():
        total, trained = _numel(parameters)
        if total:
            frozen = "" if trained == total else f"  {trained:,} trained"
            yield f"  {name:<32} {total:>15,}{frozen}"


def _numel(parameters: list[nn.Parameter]) -> tuple[int, int]:
    """Elements: of all, and of those that are trained."""
    sizes = [(full_numel(parameter), parameter.requires_grad) for parameter in parameters]
    return sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)


def _memory_lines(config: Config, task: Task) -> Iterator[str]:
    """What each ZeRO stage would need per rank, by shapes (docs/plan.md)."""
    for name, engine in config.engines.items():
        if engine.role != "train":
            continue
        yield ""
        yield f"memory per rank of engine {name}, by ZeRO stage (this run: {engine.zero_stage})"
        try:
            yield from _table(
                of_task(task, config, name, f"engine {name}"), setting_of(config, name)
            )
        except ConfigError as error:
            yield f"  not known: {error}"


def _table(subject: Subject, setting: Setting) -> Iterator[str]:
    try:
        activations = subject.activations(setting)
        reason = ""
    except ConfigError as error:
        activations, reason = None, repr(error.__cause__ or error)
    footprint = Footprint(subject.model, subject.optimizer, subject.keeps_ema)
    yield "  " + "".join(f"{name:>12}" for name in ("stage", *PARTS))
    for stage in STAGES:
        own = Setting(
            ranks=distributed.world_size(),
            stage=stage,
            optimizer=setting.optimizer,
            precision=setting.precision,
            micro_batch=setting.micro_batch,
        )
        parts = footprint.memory(own, activations).parts
        shown = [readable(parts[name]) if parts[name] else "-" for name in PARTS]
        yield "  " + "".join(f"{text:>12}" for text in (str(stage), *shown))
    if activations is None:
        yield "  activations: the forward could not be traced without memory:"
        yield f"    {reason}"


def _step_lines(task: Task, engines: Engines, batches: StepBatches) -> Iterator[str]:
    """One step of the run, in which all engines are trained: forward, backward and optimizer, on
    all ranks."""
    size = engines.gradient_accumulation
    engines.global_step = math.lcm(*(engine.train_every for engine in engines.trained)) - 1
    vector = distributed.StepVector()
    vector.add(batches)
    engines.train()
    for step in (1, 2):
        batches.prefetch(step, size)
    vector.exchange()
    vector.wait()
    batches.check_ranks()
    micro_batches, terms = batches.next_step(size)
    yield ""
    yield f"a step: micro-batches {size}; the first of rank 0"
    reports = []
    began = time.perf_counter()
    for number, batch in enumerate(micro_batches):
        if not number:
            yield from _batch_lines(batch)
        reports.append(engines.step(to_device(batch, distributed.device()), terms, number))
    engines.end_step()
    norms = {name: float(value) for name, value in engines.step_metrics().items()}
    yield f"forward, backward and optimizer: {time.perf_counter() - began:.3g} s (the first time)"
    own: dict[str, list[float]] = {}
    for report in reports:
        for name, value in report.items():
            own.setdefault(name, []).append(float(value))
    for name, values in distributed.all_reduce(own, _both).items():  # not all ranks report all
        yield f"  {name} {fmean(values):.6g}"
    for name, value in norms.items():
        yield f"  {name} {value:.6g}"
    if distributed.device().type == "cuda":
        peaks = distributed.all_gather(torch.cuda.max_memory_allocated())
        yield f"  device memory at its peak {readable(max(peaks))}"


def _both(some: dict[str, list[float]], more: dict[str, list[float]]) -> dict[str, list[float]]:
    return {name: some.get(name, []) + more.get(name, []) for name in some | more}


def _batch_lines(batch: Any) -> Iterator[str]:
    leaves, _ = tree_flatten_with_path(batch)
    for path, leaf in leaves:
        kind = type(leaf).__name__
        if isinstance(leaf, torch.Tensor):
            kind = f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}"
        yield f"  {keystr(path) or 'batch'}: {kind}"
