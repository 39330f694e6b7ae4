"""Saving about 1 GB of state: `cp`, DeepSpeed's own save, ours, and ours in the background.

    python -m bench.save [--ranks 2] [--width 9200] [--rounds 3] [--directory DIR]

Prints medians, also as ratios to `cp` of the same bytes in the same rounds. All but the background
stall, which is the time that training is blocked, include writing everything to disk (fsync). The
last lines are how long training waits for an old checkpoint of these bytes to be removed, by a
thread and if it is waited for.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from bench.rows import tell_pair
from harness.config import Config
from harness.config.sections import merge
from harness.testing.pool import RankPool

ROOT = Path(__file__).parent.parent


def measure(directory: Path, width: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of every way, in interleaved rounds; on one rank of several."""
    from harness import distributed
    from harness.callbacks.moments import Callbacks
    from harness.checkpoint.disks import find_disks
    from harness.checkpoint.save import Saver
    from harness.control.live import LiveConfig
    from harness.data.step_batches import StepBatches
    from harness.data.train_batches import train_batches
    from harness.engine.build import build_engines
    from harness.task import load_task
    from harness.utils import to_device

    table = {
        "run": {"name": "bench", "dir": directory},
        "task": {"path": str(ROOT / "tests/tasks/tiny_task.py"), "args": {"width": width}},
        "engines": {
            "net": {"ds_config": ROOT / "ds_configs/zero1.json", "optimizer": {"name": "adamw"}}
        },
        "data": {"micro_batch_size": 1},
    }
    config = Config.model_validate(table)
    background_config = Config.model_validate(merge(table, {"checkpoint": {"background": True}}))
    task = load_task(config)
    rank, world_size = distributed.global_rank(), distributed.world_size()
    batches = train_batches(task.train_data, config.data, task.collate, 0, rank, world_size)
    engines = build_engines(task, config)
    batch = to_device(next(batches), distributed.device())
    engines.step(batch)
    position = StepBatches(batches)
    seconds: dict[str, list[float]] = {}
    disks = find_disks(directory)
    saver = Saver(engines, position, LiveConfig(config), disks, Callbacks([]))
    background = Saver(engines, position, LiveConfig(background_config), disks, Callbacks([]))
    target = directory / "bench/checkpoints/step-00000000"

    def ours() -> None:
        saver.save({})

    def cp() -> None:
        if rank == 0:
            subprocess.run(["cp", "-r", target, directory / "copy"], check=True)
            sync(directory / "copy")

    def deepspeed() -> None:
        engines["net"].ds.save_checkpoint(str(directory / "plain"), tag="x")
        sync(directory / "plain")

    def stall() -> None:
        background.save({})

    def first_stall() -> None:
        """Of a run that has taken its first steps."""
        nonlocal background
        background.close()
        background = Saver(engines, position, LiveConfig(background_config), disks, Callbacks([]))
        background.poll()
        engines.step(batch)
        time.sleep(2)  # as long as the first steps of a large model take
        distributed.barrier()

    def steps(count: int) -> float:
        """Seconds of a step."""
        started = time.perf_counter()
        for _ in range(count):
            engines.step(batch)
        return (time.perf_counter() - started) / count

    def beside_a_save() -> float:
        """How much longer steps take while a save in the background writes."""
        background.save({})
        beside: list[float] = []
        while background.poll() is None:
            beside.append(steps(1))
        alone = statistics.median(steps(1) for _ in range(max(3, len(beside))))
        return statistics.median(beside) / alone

    def clean_up() -> None:
        """Finishes all writing before the next way begins."""
        background.wait()
        for name in ("copy", "plain"):
            if rank == 0:
                shutil.rmtree(directory / name, ignore_errors=True)
        os.sync()

    ours()
    stall()  # the first one also allocates its buffers
    clean_up()
    ways = [("cp", cp), ("deepspeed", deepspeed), ("harness", ours), ("background stall", stall)]
    for number in range(rounds):
        for name, way in ways[number % 4 :] + ways[: number % 4]:
            distributed.barrier()
            started = time.perf_counter()
            way()
            took = time.perf_counter() - started
            seconds.setdefault(name, []).append(max(distributed.all_gather(took)))
            clean_up()
    if rank == 0:
        seconds |= measure_pruning(target, rounds)
    for _ in range(rounds):
        first_stall()
        started = time.perf_counter()
        stall()
        took = time.perf_counter() - started
        seconds.setdefault("first stall", []).append(max(distributed.all_gather(took)))
        clean_up()
    ratios = []
    for _ in range(rounds):
        ratios.append(max(distributed.all_gather(beside_a_save())))
        clean_up()
    seconds["beside"] = ratios
    seconds["bytes"] = [float(sum(f.stat().st_size for f in target.rglob("*") if f.is_file()))]
    return seconds


def measure_pruning(target: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds to remove an older checkpoint with the content of `target`, in interleaved rounds."""
    from harness.checkpoint.manifest import read_manifest
    from harness.checkpoint.retention import Removals, prune
    from harness.config.sections import CheckpointConfig

    removals, old = Removals(), target.with_name("step-00000000-old")
    ways = {"removal by a thread": removals.add, "removal, waited for": shutil.rmtree}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, delete in ways.items():
            shutil.copytree(target, old)
            replace(read_manifest(old), saved_at=0.0).write(old)
            os.sync()
            started = time.perf_counter()
            prune(target.parent, CheckpointConfig(keep_last=1), delete=delete)
            seconds[name].append(time.perf_counter() - started)
            removals.wait()
    removals.close()
    return seconds


def sync(directory: Path) -> None:
    """Syncs every file below a directory."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def main() -> None:
    """Runs the rounds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--width", type=int, default=9200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=None)
    args = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="bench-save-", dir=args.directory))
    try:
        with RankPool(args.ranks, timeout_s=1200) as pool:
            seconds = pool.run(measure, directory, args.width, args.rounds)[0]
    finally:
        shutil.rmtree(directory)
    size, beside = seconds.pop("bytes")[0], seconds.pop("beside")
    reference = statistics.median(seconds["cp"])
    sys.stdout.write(f"{size / 1e9:.2f} GB, {args.ranks} ranks, medians of {args.rounds}\n")
    for name, values in seconds.items():
        median = statistics.median(values)
        spread = f"{min(values):.2f} .. {max(values):.2f}"
        ratio = median / reference
        sys.stdout.write(f"{name:<20} {median:8.3f} s  {ratio:6.2f} x cp   ({spread})\n")
    size_text = f"{size / 1e9:.2f} GB"
    save, cp = seconds["harness"], seconds["cp"]
    tell_pair(f"a save of {size_text}", "s", save, "cp, synced", cp)
    tell_pair(f"a save of {size_text}", "s", save, "save_checkpoint", seconds["deepspeed"])
    stall = seconds["background stall"]
    tell_pair(f"what a background save of {size_text} stalls", "s", stall, "cp, synced", cp)
    middle, low, high = statistics.median(beside), min(beside), max(beside)
    name = "a step beside a save"
    sys.stdout.write(f"{name:<24} {middle:6.2f} x alone  ({low:.2f} .. {high:.2f})\n")


if __name__ == "__main__":
    main()
