"""The command `harness plan`. Torch is imported when it runs."""

import argparse
import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.byte_sizes import size
from harness.errors import ConfigError
from harness.sizing.setting import OFFLOADS, OPTIMIZERS, PRECISIONS, Setting
from harness.sizing.text import as_json, lines_of

if TYPE_CHECKING:
    from harness.sizing.sources import Subject

SIZES = ("layers", "hidden", "heads", "ffn", "vocabulary", "kv_heads")
SETTINGS = {
    "ranks": "GPUs",
    "stage": "ZeRO stage, 0 to 3",
    "seq_len": "tokens of a sample; default: 1024",
    "micro_batch": "samples of a rank in a micro-batch; default: 1",
    "accumulation": "micro-batches in a step; default: 1",
}
MOST_CHANGES = 5


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `harness plan`."""
    add: Any = parser.add_argument
    add(
        "model",
        nargs="?",
        help="a run's .toml; module:function that returns a model, or (model, inputs); a folder "
        "with a Hugging Face config.json; nothing: a LLaMA of the sizes given",
    )
    add("--engine", metavar="NAME", help="engine of the .toml; default: the first trained one")
    for name in SIZES:
        add(f"--{name.replace('_', '-')}", metavar="N", type=int, help="of a LLaMA")
    for name, text in SETTINGS.items():
        add(f"--{name.replace('_', '-')}", metavar="N", type=int, help=text)
    add("--offload", choices=OFFLOADS, help="what is in host memory")
    add("--optimizer", choices=OPTIMIZERS, help="default: adamw")
    add("--precision", choices=PRECISIONS, help="default: bf16")
    add("--checkpointing", action="store_true", default=None, help="compute blocks again")
    add("--no-activations", action="store_true", help="do not trace the forward")
    add("--memory", metavar="SIZE", type=size, help="of a GPU, like 80GiB: what would fit")
    add("--disk", metavar="MB/s", type=float, default=1000.0, help="default: 1000, for all ranks")
    add("--json", action="store_true", help="print one JSON object")


def run_plan(args: argparse.Namespace, print_line: Callable[[str], None]) -> int:
    """Prints a plan; 1 if it does not fit."""
    if not args.disk > 0:
        raise ConfigError(f"--disk {args.disk}: expected MB/s, above 0")
    subject, setting = _subject(args)
    found = plan(subject, setting, args.memory, args.disk, not args.no_activations)
    if args.json:
        print_line(json.dumps(as_json(found)))
    else:
        for line in lines_of(found):
            print_line(line)
    return int(found["fits"] is False)


def _subject(args: argparse.Namespace) -> "tuple[Subject, Setting]":
    from harness.sizing import sources

    keys = (*SETTINGS, "offload", "optimizer", "precision", "checkpointing")
    given = {key: getattr(args, key) for key in keys if getattr(args, key) is not None}
    sizes = {key: getattr(args, key) for key in SIZES if getattr(args, key) is not None}
    if args.model and sizes:
        raise ConfigError(f"{args.model}, and the sizes of a LLaMA: expected one of them")
    if not args.model:
        return sources.from_sizes(sizes), Setting(**given)
    path = Path(args.model)
    if path.suffix == ".toml":
        return sources.from_task(path, args.engine, given)
    if path.exists():
        return sources.from_folder(path), Setting(**given)
    if ":" not in args.model:
        raise ConfigError(f"{args.model}: no such file or folder, and not module:function")
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does, which a script does not
    return sources.from_import_path(args.model), Setting(**given)


def plan(
    subject: "Subject",
    setting: Setting,
    limit: int | None = None,
    disk: float = 1000.0,
    traces: bool = True,
) -> dict[str, Any]:
    """What a setting needs; with a `limit` in bytes also whether it fits, and what would.
    `disk`: MB/s. All sizes in bytes."""
    from harness.sizing.changes import changes_that_fit
    from harness.sizing.memory import Footprint, checkpoint_bytes
    from harness.sizing.traffic import traffic_of

    footprint = Footprint(subject.model, subject.optimizer, subject.keeps_ema)

    @cache
    def activations(micro_batch: int, precision: str) -> Any:
        traced = Setting(micro_batch=micro_batch, precision=precision, seq_len=setting.seq_len)
        return subject.activations(traced) if traces else None

    def memory(of: Setting) -> Any:
        return footprint.memory(of, activations(of.micro_batch, of.precision))

    needed, sizes = memory(setting), footprint.sizes(setting)
    optimizer = footprint.optimizer(setting.optimizer)
    files = checkpoint_bytes(needed, sizes, setting)
    fits = None if limit is None else needed.device <= limit
    changes = []
    if limit is not None and not fits:
        changes = changes_that_fit(setting, lambda of: memory(of).device, limit)[:MOST_CHANGES]
    return {
        "model": subject.title,
        "parameters": sum(sum(group.values()) for group in sizes),
        "setting": setting,
        "traced": traces,
        "memory": dict(needed.parts),
        "on_host": needed.on_host,
        "device_bytes": needed.device,
        "host_bytes": needed.host,
        "sent": traffic_of(optimizer, setting),
        "checkpoint_bytes": files,
        "save_s": files / (disk * 1e6),
        "limit": limit,
        "fits": fits,
        "changes": changes,
    }
