"""Command-line tools for runs, checkpoints and weight files."""

import argparse
import platform
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from harness import __version__
from harness.convert.command import add_convert_arguments, run_convert
from harness.errors import ConfigError, HarnessError
from harness.sizing.command import add_plan_arguments, run_plan


class Subcommand(NamedTuple):
    """A row of COMMANDS. Only `run` imports packages that are slow to import."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    """Returns the exit code."""
    description: str = ""
    epilog: str = "exit code: 0 done, 2 failed, 130 interrupted"
    uses_error_codes: bool = False
    """Whether the exit code of an error is its own code, instead of 2."""


def command_line() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = argparse.ArgumentParser(prog="harness", description=__doc__)
    parser.add_argument("--version", action=_Version, help="print versions, and exit")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        command.add_arguments(
            subparsers.add_parser(
                name,
                help=command.help,
                description=command.description or None,
                epilog=command.epilog,
            )
        )
    return parser


def main() -> None:
    """Runs a subcommand; a user error is one message and exit code 2."""
    args = command_line().parse_args()
    command = COMMANDS[args.command]
    try:
        if exit_code := command.run(args):
            sys.exit(exit_code)
    except HarnessError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.code if command.uses_error_codes else 2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader, like `head`, closed the pipe
        sys.stderr.close()
    except OSError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


class _Version(argparse.Action):
    """Prints the version of harness, and those of what it runs on, which decide as much."""

    def __init__(self, option_strings: list[str], dest: str, help: str):
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        below = ", ".join(f"{name} {version(name)}" for name in ("deepspeed", "torch"))
        print_line(f"harness {__version__} ({below}, Python {platform.python_version()})")
        parser.exit()


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `harness doctor`."""
    add: Any = parser.add_argument
    add("dir", type=Path, nargs="?", default=Path("runs"), help="where runs write; default: runs")


def run_doctor(args: argparse.Namespace) -> int:
    """Prints the findings; 1 if one of them would stop a run."""
    from harness.doctor import examine

    worst = 0
    for finding in examine(args.dir):
        worst = max(worst, int(finding.state == "error"))
        for line in finding.lines():
            print_line(line)
    return worst


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `harness inspect`."""
    parser.add_argument("path", help="run directory, checkpoint, .sft or .pt; or a store's URL")
    parser.add_argument("--verify", action="store_true", help="read all data, and check every CRC")


def run_inspect(args: argparse.Namespace) -> int:
    """Prints what a path contains."""
    from harness.checkpoint.inspect import describe

    try:
        sys.stdout.writelines(f"{line}\n" for line in describe(args.path, args.verify))
    finally:
        sys.stdout.flush()  # before the error, if there is one
    return 0


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `harness report`."""
    add: Any = parser.add_argument
    add("run_dirs", metavar="RUN_DIR", type=Path, nargs="+", help="runs/NAME; several are compared")
    add("-o", "--output", metavar="FILE", type=Path, help="default: report.html in the first one")
    add("--png", metavar="DIR", type=Path, help="also write each chart into this folder")
    add(
        "--live",
        metavar="PORT",
        type=int,
        nargs="?",
        const=6007,
        help="instead of a file, serve the report on this machine (port 6007 by default), and "
        "refresh it while the runs continue",
    )


def run_report(args: argparse.Namespace) -> int:
    """Writes a report, or serves it until Ctrl-C."""
    from harness.report.build import serve_report, write_report

    if args.live is not None:
        serve_report(args.run_dirs, args.live, print_line)
    else:
        write_report(args.run_dirs, args.output, args.png, print_line)
    return 0


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `harness run`."""
    add: Any = parser.add_argument
    add("--max-restarts", metavar="N", type=int, default=10, help="default: 10")
    add(
        "--backoff",
        metavar="SECONDS",
        type=float,
        default=5.0,
        help="before a restart; doubled, up to 300, as long as no step is gained; default: 5",
    )
    add("words", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what starts the run")


def run_run(args: argparse.Namespace) -> int:
    """Runs a command until the run is complete. Its exit code."""
    from harness.health.supervisor import Supervisor

    command = args.words[1:] if args.words[:1] == ["--"] else args.words
    if not command:
        raise ConfigError("no command: expected harness run -- deepspeed launch/train.py ...")
    return Supervisor(command, args.max_restarts, args.backoff).run()


def add_ctl_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `harness ctl`."""
    add: Any = parser.add_argument
    add("--json", action="store_true", help="print each answer as a JSON object")
    add(
        "--wait",
        metavar="SECONDS",
        type=float,
        default=0.0,
        help="for a job that has only just been started: how long it may take until it listens",
    )
    add("run_dir", type=Path, help="the job's run directory, on rank 0's machine")
    add("words", nargs="*", metavar="COMMAND", help="like: lr x0.5")


def run_ctl(args: argparse.Namespace) -> int:
    """Sends commands to a running job."""
    from harness.control.client import connected, send_command, send_stdin

    with closing(connected(args.run_dir, args.wait)) as client:
        if args.words:
            return send_command(client, " ".join(args.words), args.json)
        return send_stdin(client, args.run_dir, args.json)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `harness data`."""
    kinds = parser.add_subparsers(dest="action", required=True)
    prepare = kinds.add_parser(
        "prepare",
        help="tokenize texts into a corpus",
        description="Tokenizes texts into DST.bin and DST.idx (Megatron-LM's format), which appear "
        "complete, or not at all. Each text, with the token that ends it, is a document.",
    )
    add: Any = prepare.add_argument
    add(
        "src",
        metavar="SRC",
        type=Path,
        nargs="+",
        help="files or folders of text, .jsonl, .parquet; data sets of save_to_disk",
    )
    add("dst", metavar="DST", type=Path, help="path of the corpus, without suffix")
    add(
        "--tokenizer",
        metavar="PATH",
        required=True,
        help='tokenizer.json or a folder with one (Hugging Face), or "bytes"',
    )
    add("--field", default="text", help="field or column that holds the text; default: text")
    add("--glob", default="*", help="files to read in folders, like '*.py'; default: all")
    add("--lines", action="store_true", help="each line of a text file is a document")
    end = prepare.add_mutually_exclusive_group()
    end.add_argument("--eos", metavar="TOKEN", help="what ends a document, if it is not obvious")
    end.add_argument("--no-eos", action="store_true", help="nothing ends a document")


def run_data(args: argparse.Namespace) -> int:
    """Prepares a corpus, and prints what it holds."""
    from harness.data.prepare import Options, prepare

    eos = "" if args.no_eos else args.eos
    options = Options(args.tokenizer, args.field, args.lines, args.glob, eos)
    prepare(args.src, args.dst, options, print_line)
    return 0


def print_line(line: str) -> None:
    """Writes a line to standard output, unbuffered."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


COMMANDS = {
    "inspect": Subcommand(
        "show what a checkpoint, .sft or .pt contains", add_inspect_arguments, run_inspect
    ),
    "report": Subcommand(
        "show what runs have done, as a page to look at",
        add_report_arguments,
        run_report,
        description="Writes one HTML file that opens offline: losses, evaluations, rates, speed, "
        "memory, slow ranks, where the time has gone, and what happened when; of several runs, "
        "also what differs in their configs.",
    ),
    "run": Subcommand(
        "start a run, and start it again after faults",
        add_run_arguments,
        run_run,
        description="Runs `deepspeed launch/train.py ...`, or torchrun, srun, python, and starts "
        "it again after an end that a restart may mend: a lost rank, a hang, a signal to a rank. "
        "A signal to this process is passed on, and ends the run.",
        epilog="exit code: 0 complete, 2 a mistake in the config, 75 a restart may help, 128 + N "
        "signal N; others: of the run",
    ),
    "doctor": Subcommand(
        "check what on this machine would stop or slow a run",
        add_doctor_arguments,
        run_doctor,
        description="Checks versions, devices, the network between ranks, port, shared memory, "
        "limits, disk, clock, compiler and stale locks, each with a remedy.",
        epilog="exit code: 0 a run can start, 1 something would stop it, 130 interrupted",
    ),
    "plan": Subcommand(
        "what a run would need: memory, traffic, checkpoints",
        add_plan_arguments,
        lambda args: run_plan(args, print_line),
        description="Computes from shapes, without a GPU, what a model needs per rank.",
        epilog="exit code: 0 done (or it fits), 1 it does not fit in --memory, 2 a mistake",
    ),
    "ctl": Subcommand(
        "send commands to a running job",
        add_ctl_arguments,
        run_ctl,
        description="Sends a command to a running job, and waits for its result; without a "
        "command, reads commands from standard input or a prompt. `harness ctl RUN_DIR help` "
        "lists all commands.",
        epilog="exit code: 0 done, 1 failed, 2 rejected, 3 no answer",
        uses_error_codes=True,
    ),
    "convert": Subcommand(
        "convert a checkpoint to plain weights, or weights to another format",
        add_convert_arguments,
        lambda args: run_convert(args, print_line),
        description="Streams the weights of any DeepSpeed checkpoint, or of a file, to DST, in "
        "constant memory. DST appears complete, or not at all.",
    ),
    "data": Subcommand("prepare training data", add_data_arguments, run_data),
}

if __name__ == "__main__":
    main()
