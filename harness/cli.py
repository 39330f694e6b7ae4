"""The command `harness`: tools beside a run."""

import argparse
import sys
from pathlib import Path

from harness.control.client import talk, tell
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
    args = parser.parse_args()
    try:
        if args.command == "inspect":
            show(args.path, args.verify)
        elif args.words:
            sys.exit(tell(args.run_dir, " ".join(args.words), args.json))
        else:
            sys.exit(talk(args.run_dir, args.json))
    except HarnessError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader, like `head`, has had enough
        sys.stderr.close()


def show(path: Path, verify: bool) -> None:
    """Prints what `path` holds."""
    from harness.checkpoint.inspect import describe  # late: `--help` need not wait for torch

    for line in describe(path, verify):
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
