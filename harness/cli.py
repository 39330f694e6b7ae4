"""The command `harness`: tools beside a run."""

import argparse
import re
import signal
import sys
from pathlib import Path
from typing import Any

from harness.errors import HarnessError


def main() -> None:
    """Runs a subcommand; the user's mistakes are one message and exit code 2."""
    parser = argparse.ArgumentParser(prog="harness", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="what a checkpoint, an .sft or a .pt holds")
    inspect.add_argument("path", type=Path, help="run directory, checkpoint, .sft or .pt")
    inspect.add_argument("--verify", action="store_true", help="read it all, and check every CRC")
    ctl = commands.add_parser(
        "ctl",
        help="commands to a running job",
        description="Sends a command to a running job, and waits for what it leads to; without a "
        "command, those of standard input, or a prompt. `harness ctl RUN_DIR help` lists them.",
        epilog="exit code: 0 done, 1 failed, 2 rejected, 3 no answer",
    )
    ctl.add_argument("--json", action="store_true", help="print every answer as a JSON object")
    ctl.add_argument("run_dir", type=Path, help="the job's run directory, on rank 0's machine")
    ctl.add_argument("words", nargs="*", metavar="COMMAND", help="like: lr x0.5")
    _add_convert(commands)
    args = parser.parse_args()
    try:
        if args.command == "inspect":
            show(args.path, args.verify)
        elif args.command == "convert":
            turn(args)
        else:
            sys.exit(command(args))
    except HarnessError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.code if args.command == "ctl" else 2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader, like `head`, has had enough
        sys.stderr.close()
    except OSError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


def command(args: argparse.Namespace) -> int:
    """Sends commands to a running job. The exit code."""
    from harness.control.client import talk, tell  # late: conversions start faster without

    if args.words:
        return tell(args.run_dir, " ".join(args.words), args.json)
    return talk(args.run_dir, args.json)


def _add_convert(commands: Any) -> None:
    convert = commands.add_parser(
        "convert",
        help="a checkpoint into plain weights, or weights into another format",
        description="Streams the weights of any DeepSpeed checkpoint, or of a file, to DST: peak "
        "memory does not depend on their size. DST appears whole, or not at all.",
        epilog="exit code: 0 done, 2 it cannot be done, 130 interrupted",
    )
    convert.add_argument(
        "src",
        metavar="SRC",
        type=Path,
        help="run directory, checkpoint directory (also of plain DeepSpeed, Accelerate, the HF "
        "Trainer), one tag of it, a folder of Hugging Face shards, .sft or .pt",
    )
    convert.add_argument("dst", metavar="DST", type=Path, help=".sft, .safetensors, .pt or .pth")
    convert.add_argument(
        "--shard-size",
        metavar="SIZE",
        type=size,
        help="like 5GB: DST is a new directory of Hugging Face shards and their index",
    )
    convert.add_argument(
        "--dtype",
        choices=["fp32", "bf16", "fp16", "keep"],
        help="of floating-point weights; keep: what the model computes in. fp32 for a checkpoint "
        "(its master weights, bit for bit), keep for a file",
    )
    convert.add_argument(
        "--what",
        choices=["weights", "ema", "optimizer", "all"],
        default="weights",
        help="ema: the average that ema_decay keeps, in the weights' place; optimizer: master "
        "weights and moments, as optimizer.KEY.NAME",
    )
    convert.add_argument(
        "--to-zero",
        metavar="STAGE",
        type=int,
        choices=[1, 2, 3],
        help="write no weights, but a checkpoint that plain DeepSpeed resumes at this ZeRO stage: "
        "DST is a new directory. With --ranks, and --round-robin",
    )
    convert.add_argument(
        "--ranks", metavar="N", type=int, help="how many ranks will resume it; 1 by default"
    )
    convert.add_argument(
        "--round-robin",
        choices=["true", "false"],
        help="what round_robin_gradients is there; must be given if it was true",
    )
    convert.add_argument("--engine", metavar="NAME", help="which engine of a checkpoint of several")
    for option, what in (("include", "take only"), ("exclude", "leave out")):
        convert.add_argument(
            f"--{option}",
            metavar="REGEX",
            action="append",
            default=[],
            help=f"{what} tensors in whose name it is found; may be repeated",
        )
    convert.add_argument(
        "--rename",
        metavar="OLD=NEW",
        action="append",
        default=[],
        help="replace the regular expression OLD in names, like '^module\\.='; may be repeated",
    )
    convert.add_argument("--dry-run", action="store_true", help="print what would be written")
    convert.add_argument(
        "--verify",
        action="store_true",
        help="check the CRCs of what is read, that the layout is understood (ZeRO 1 and 2 at 16 "
        "bits: weights are the rounded masters), and read back what was written",
    )


def size(text: str) -> int:
    """Bytes from a text like 500MB or 5GB; units are powers of 1000, of 1024 with an i (GiB)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size like 5GB")
    unit = 1024 if match[3] else 1000
    return int(float(match[1]) * unit ** " KMGT".index(match[2].upper() or " "))


def turn(args: argparse.Namespace) -> None:
    """Converts, and tells what came of it. SIGTERM tidies up as SIGINT does."""
    from harness.convert.convert import Options, convert

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = Options(
        what=args.what,
        dtype=args.dtype,
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
    convert(args.src, args.dst, options, print_line)


def print_line(line: str) -> None:
    """Writes a line to standard output at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def show(path: Path, verify: bool) -> None:
    """Prints what `path` holds."""
    from harness.checkpoint.inspect import describe  # late: `--help` need not wait for torch

    for line in describe(path, verify):
        print_line(line)


if __name__ == "__main__":
    main()
