"""What a user waits for at a prompt: `harness inspect`, `harness convert` of small tensors and with
`--verify`, and the end of a process that has trained.

    python -m bench.waits [--rounds 5] [--before TREE] [--directory DIR] [--only TEXT]

`--before`: another checkout of harness, whose times are measured in the same rounds. Prints, for
each command, the median CPU seconds (of all threads) of interleaved rounds, the range, and the
median seconds on the clock, which other work on the machine makes longer.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from bench import convert
from bench.rows import Row, tell, tell_pair

ROOT = Path(__file__).parent.parent
HARNESS = [sys.executable, "-c", "from harness.cli import main; main()"]
VERIFY = ", --verify"


def write_run(directory: Path, checkpoints: int, tensors: int = 8, ranks: int = 2) -> None:
    """A run with small checkpoints of an engine at ZeRO 2."""
    import torch

    from harness.checkpoint.manifest import EngineManifest, Manifest, step_directory
    from harness.checkpoint.written import write_file

    parent = directory / "checkpoints"
    first = step_directory(parent, 1)
    (first / "net").mkdir(parents=True)
    tree = {f"layers.{number}.weight": torch.zeros(4) for number in range(tensors)}
    names = [f"net/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(ranks)]
    names += ["net/mp_rank_00_model_states.pt", *(f"rank-{rank:05d}.pt" for rank in range(ranks))]
    manifest = Manifest(
        step=1,
        world_size=ranks,
        engines={
            "net": EngineManifest(
                zero_stage=2, dtype="torch.float32", optimizer="torch.optim:AdamW", layout=""
            )
        },
        files={name: write_file(tree, first / name) for name in names},
        hosts=["host"] * ranks,
        config_digest="",
    )
    for step in range(1, checkpoints + 1):
        copy = step_directory(parent, step)
        if step > 1:
            shutil.copytree(first, copy)
        replace(manifest, step=step, saved_at=float(step)).write(copy)


def write_small_tensors(directory: Path, stage: int, tensors: int) -> None:
    """A checkpoint of 2 ranks with many small tensors."""
    shapes = {f"layers.{number}.weight": (32,) for number in range(tensors)}
    convert.write_checkpoint_of(shapes, directory, stage, 2)


def commands(directory: Path) -> dict[str, list[str]]:
    """Writes the inputs; the commands by name."""
    found: dict[str, list[str]] = {"python": [sys.executable, "-c", "pass"]}
    for count in (1, 100, 1000):
        write_run(directory / f"run-{count}", count)
        text = f"inspect, {count} checkpoint{'s' * (count > 1)}"
        found[text] = [*HARNESS, "inspect", str(directory / f"run-{count}")]
    for stage in (2, 3):
        for count in (2000, 20000):
            source = directory / f"small-{stage}-{count}"
            write_small_tensors(source, stage, count)
            target = str(directory / "x.sft")
            found[f"convert, ZeRO {stage}, {count} tensors"] = [
                *HARNESS, "convert", str(source), target,
            ]  # fmt: skip
    for stage in (2, 3):
        source, target = directory / f"large-{stage}", str(directory / "x.sft")
        size = convert.write_checkpoint(source, stage, 2, 1e8)
        text = f"convert, ZeRO {stage}, {size / 1e9:.1f} GB"
        found[text] = [*HARNESS, "convert", str(source), target]
        found[text + VERIFY] = [*found[text], "--verify"]
    return found


def measure(command: list[str], tree: Path) -> tuple[float, float]:
    """The seconds of CPU time and on the clock that a command takes."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, env=environment, cwd=tree)
    after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - started
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return used, seconds


def seconds_to_end(end: str) -> float:
    """From the last statement of a process that has imported DeepSpeed until it has ended."""
    code = f"""
import time, deepspeed
from harness.launcher.leave import leave_after
def main():
    print(time.monotonic())
{end}
"""
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return time.monotonic() - float(ended.stdout.splitlines()[-1])


def compare_ends(rounds: int) -> None:
    """Prints how long a process takes to end in order, and as `launch/train.py` does."""
    seconds: dict[str, list[float]] = {"main()": [], "leave_after(main)": []}
    for _ in range(rounds):
        for end, found in seconds.items():
            found.append(seconds_to_end(end))
    ordered, direct = seconds.values()
    tell_pair("the end of a run's process", "s", direct, "the interpreter's tear-down", ordered)
    for end, found in seconds.items():
        text = f"end after {end}"
        sys.stdout.write(
            f"{text:<32} {statistics.median(found):.3f} s ({min(found):.3f} .. {max(found):.3f})\n"
        )


def tell_all(results: dict[str, list[tuple[float, float]]]) -> None:
    """Adds the commands to the table: CPU time, and on the clock what `--verify` adds."""
    for name, runs in results.items():
        tell(Row(name, statistics.median(used for used, _ in runs), "s of CPU"))
        if (alone := name.removesuffix(VERIFY)) != name and alone in results:
            clock, clock_alone = ([seconds for _, seconds in results[n]] for n in (name, alone))
            tell_pair(name, "s", clock, "convert alone", clock_alone)


def main() -> None:
    """Runs the rounds and prints a line for each command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--before", type=Path, help="another checkout of harness")
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--only", default="", help="commands whose name contains this")
    args = parser.parse_args()
    if args.only in "end":
        compare_ends(args.rounds)
    trees = {"": ROOT} | ({"before": args.before.absolute()} if args.before else {})
    with tempfile.TemporaryDirectory(prefix="bench-waits-", dir=args.directory) as directory:
        found = {n: c for n, c in commands(Path(directory)).items() if args.only in n}
        results: dict[str, dict[str, list[tuple[float, float]]]] = {
            name: {tree: [] for tree in trees} for name in found
        }
        for number in range(args.rounds + 1):
            for name, command in found.items():
                for tree, path in trees.items():
                    measured = measure(command, path)
                    if number:  # the first round warms the cache
                        results[name][tree].append(measured)
    tell_all({name: by_tree[""] for name, by_tree in results.items()})
    for name, by_tree in results.items():
        medians = {tree: statistics.median(u for u, _ in runs) for tree, runs in by_tree.items()}
        for tree, runs in by_tree.items():
            used = [used for used, _ in runs]
            clock = statistics.median(seconds for _, seconds in runs)
            ratio = f" {medians['before'] / medians['']:5.2f} x" if tree else ""
            sys.stdout.write(
                f"{name:<32} {tree:<7} {medians[tree]:6.3f} s of CPU "
                f"({min(used):.3f} .. {max(used):.3f}), {clock:6.3f} s{ratio}\n"
            )


if __name__ == "__main__":
    main()
