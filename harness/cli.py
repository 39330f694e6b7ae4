"""The command `harness`: tools beside a run."""

import argparse
import sys
from pathlib import Path

from harness.errors import HarnessError


def main() -> None:
    """Runs a subcommand; the user's mistakes are one message and exit code 2."""
    parser = argparse.ArgumentParser(prog="harness", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="what a checkpoint, an .sft or a .pt holds")
    inspect.add_argument("path", type=Path, help="run directory, checkpoint, .sft or .pt")
    inspect.add_argument("--verify", action="store_true", help="read it all, and check every CRC")
    args = parser.parse_args()
    try:
        show(args.path, args.verify)
    except HarnessError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.code)
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
