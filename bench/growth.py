"""How the time of commands on files grows with tensors, ranks and checkpoints.

    python -m bench.growth [--rounds 3] [--directory DIR] [--only TEXT]

Prints, for each, the CPU seconds at three sizes (the least of interleaved rounds, so that other
work on the machine counts little) and the exponent k of `a + b * size ** k` through them: 1 is
linear, whatever the start of a process takes. Where the growth is as small as the noise, there is
no exponent.
"""

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from bench import waits
from bench.convert import write_checkpoint_of
from bench.rows import Row, tell

NOISE = 0.05
"""Seconds that a process takes more or less from one round to the next."""


class Growth(NamedTuple):
    """A command at three sizes, each the same multiple of the one before."""

    name: str
    sizes: tuple[int, int, int]
    prepare: Callable[[Path, int], Callable[[], float]]
    """Writes the input of one size; the result runs the command, and returns its CPU seconds."""


def convert(stage: int, *options: str, ranks: int | None = None, tensors: int = 0) -> Growth:
    """A conversion of `tensors` on a growing number of ranks, or of growing tensors on `ranks`."""

    def prepare(directory: Path, size: int) -> Callable[[], float]:
        shapes = {f"layers.{n}.weight": (32,) for n in range(tensors or size)}
        write_checkpoint_of(shapes, directory / "saved", stage, ranks or size)
        command = [*waits.HARNESS, "convert", str(directory / "saved"), str(directory / "x.sft")]
        return lambda: waits.measure([*command, *options], waits.ROOT)[0]

    what = " ".join(["convert, ZeRO", f"{stage},", *options])
    if ranks is None:
        return Growth(f"{what} {tensors} tensors; ranks", (2, 4, 8), prepare)
    return Growth(f"{what} {ranks} ranks; tensors", (300, 3000, 30000), prepare)


def inspect(directory: Path, size: int) -> Callable[[], float]:
    """`harness inspect` of a run."""
    waits.write_run(directory, size)
    command = [*waits.HARNESS, "inspect", str(directory)]
    return lambda: waits.measure(command, waits.ROOT)[0]


def prune(directory: Path, size: int) -> Callable[[], float]:
    """The choice of the checkpoints to remove, all of which are kept."""
    from harness.checkpoint.retention import prune
    from harness.config.sections import CheckpointConfig

    waits.write_run(directory, size)

    def run() -> float:
        started = time.process_time()
        prune(directory / "checkpoints", CheckpointConfig(keep_last=size))
        return time.process_time() - started

    return run


GROWTHS = [
    convert(2, ranks=2),
    convert(3, ranks=2),
    convert(2, "--verify", ranks=2),
    convert(2, tensors=10000),
    convert(3, tensors=10000),
    Growth("inspect; checkpoints", (10, 100, 1000), inspect),
    Growth("pruning, nothing to remove; checkpoints", (10, 100, 1000), prune),
]


def exponent(sizes: tuple[int, ...], seconds: list[float], noise: float) -> float | None:
    """k of `a + b * size ** k`; None if the seconds differ by the noise only."""
    first, second = seconds[1] - seconds[0], seconds[2] - seconds[1]
    if second < noise:
        return None
    return math.log(second / max(first, noise / 2)) / math.log(sizes[1] / sizes[0])


def grows(power: float | None) -> str:
    """For the table."""
    return "constant" if power is None else f"grows as size ** {power:.2f}"


def main() -> None:
    """Measures, and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--only", default="", help="those whose name contains this")
    args = parser.parse_args()
    for growth in [growth for growth in GROWTHS if args.only in growth.name]:
        with tempfile.TemporaryDirectory(prefix="bench-growth-", dir=args.directory) as directory:
            runs = [growth.prepare(Path(directory) / str(n), n) for n in growth.sizes]
            rounds = [[run() for run in runs] for _ in range(args.rounds)]
        seconds = [min(of_size) for of_size in zip(*rounds, strict=True)]
        found = exponent(growth.sizes, seconds, NOISE)
        text = ", ".join(f"{n}: {s:.3f}" for n, s in zip(growth.sizes, seconds, strict=True))
        tell(Row(f"{growth.name} {growth.sizes}", seconds[-1], "s of CPU", note=grows(found)))
        power = "constant" if found is None else f"exponent {found:.2f}"
        sys.stdout.write(f"{growth.name:<48} {text}  {power}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
