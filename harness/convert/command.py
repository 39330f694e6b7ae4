"""The command `harness convert`."""

import argparse
import gc
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.byte_sizes import size
from harness.convert.run_checkpoints import best_in
from harness.remote_path import as_path

PrintLine = Callable[[str], object]


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `harness convert`."""
    add: Any = parser.add_argument
    add(
        "src",
        metavar="SRC",
        type=_path,
        help="run directory, checkpoint directory (also of plain DeepSpeed, Accelerate, the HF "
        "Trainer) or one of its tags, folder of Hugging Face shards, .sft or .pt "
        "(.pth, .bin, .ckpt), by its content; on a disk, or a URL of a store",
    )
    add("dst", metavar="DST", type=_path, help=".sft, .safetensors, .pt, .pth, .bin or .ckpt")
    add(
        "--shard-size",
        metavar="SIZE",
        type=size,
        help="like 5GB: write Hugging Face shards and their index; DST must be a new directory",
    )
    add(
        "--dtype",
        choices=["fp32", "bf16", "fp16", "keep"],
        help="dtype of floating-point weights; keep: the dtype that the model computes in. "
        "Default: fp32 for a checkpoint (its master weights, bit for bit), keep for a file",
    )
    add(
        "--what",
        choices=["weights", "ema", "optimizer", "all"],
        default="weights",
        help="ema: the EMA weights of ema_decay instead of the weights; optimizer: master weights "
        "and moments, as optimizer.KEY.NAME",
    )
    add(
        "--key",
        metavar="KEY",
        help="part of a .pt that holds the weights, like model or state.model; default: all of it, "
        "or the only part that is a dict of tensors",
    )
    add(
        "--best",
        action="store_true",
        help="of a run directory, or a run's checkpoints in a store: the best one, by "
        "checkpoint.best_metric, instead of the newest",
    )
    add("--engine", metavar="NAME", help="engine to convert, if the checkpoint has several")
    _add_zero_arguments(parser)
    for option, action in (("include", "keep only"), ("exclude", "skip")):
        add(
            f"--{option}",
            metavar="REGEX",
            action="append",
            default=[],
            help=f"{action} tensors whose name contains a match of REGEX; may be repeated",
        )
    add(
        "--rename",
        metavar="OLD=NEW",
        action="append",
        default=[],
        help="replace matches of the regular expression OLD in names, like '^module\\.='; may be "
        "repeated",
    )
    add("--dry-run", action="store_true", help="print what would be written")
    add(
        "--verify",
        action="store_true",
        help="check the CRCs of what is read and the layout (ZeRO 1 and 2 at 16 bits: weights must "
        "be the rounded masters), and read back what was written",
    )


def _path(text: str) -> Path:
    try:
        return as_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _add_zero_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `harness convert` that write a checkpoint."""
    parser.add_argument(
        "--to-zero",
        metavar="STAGE",
        type=int,
        choices=[1, 2, 3],
        help="instead of weights, write a checkpoint that plain DeepSpeed loads at this ZeRO "
        "stage; DST must be a new directory. See --ranks and --round-robin",
    )
    parser.add_argument(
        "--ranks", metavar="N", type=int, help="number of ranks that will load it; default 1"
    )
    parser.add_argument(
        "--round-robin",
        choices=["true", "false"],
        help="round_robin_gradients of the engine that will load it; required if it was true",
    )


def run_convert(args: argparse.Namespace, print_line: PrintLine) -> int:
    """Converts, and prints the result. SIGTERM cleans up like SIGINT."""
    from harness.convert.convert import Options, convert

    gc.set_threshold(200_000)  # what it makes for each tensor stays until the end
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = Options(
        what=args.what,
        dtype=args.dtype,
        key=args.key,
        include=tuple(args.include),
        exclude=tuple(args.exclude),
        rename=tuple(args.rename),
        engine=args.engine,
        shard_size=args.shard_size,
        dry_run=args.dry_run,
        verify=args.verify,
        to_zero=args.to_zero,
        ranks=args.ranks,
        round_robin=None if args.round_robin is None else args.round_robin == "true",
    )
    src = args.src
    if args.best:
        src = best_in(src)
        print_line(f"note: the best checkpoint is {src.name}")
    convert(src, args.dst, options, print_line)
    return 0
