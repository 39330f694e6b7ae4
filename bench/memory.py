"""A step kept in host memory, and a start from there, against the disk.

    python -m bench.memory [--ranks 2] [--stage 1] [--width 9200] [--rounds 3] [--directory DIR]

Prints how long training waits for a save on the disk (with fsync), for one in the background, and
for a step that is kept in memory (`checkpoint.in_memory_every`); and the seconds in which a new
start checks and loads the state: from memory, from the disk, and from the disk when the system has
not kept the files in its own memory (`posix_fadvise`). Medians of interleaved rounds, of the
slowest rank.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench import resume
from bench.rows import tell_pair
from harness.config import Config
from harness.config.sections import merge
from harness.testing.pool import RankPool

Seconds = dict[str, list[float]]


def config_of(directory: Path, stage: int, width: int) -> Config:
    """The run of `bench.resume`, which keeps each step in memory."""
    config = resume.config_of(directory, stage, width)
    kept = config.checkpoint.model_copy(update={"in_memory_every": 1, "keep_last": 1})
    return config.model_copy(update={"checkpoint": kept})


def measure(config: Config, rounds: int) -> Seconds:
    """Seconds of every way on this rank; and the bytes of a checkpoint."""
    from harness import distributed
    from harness.callbacks.moments import Callbacks
    from harness.checkpoint.completeness import common_manifest, verify_checkpoint
    from harness.checkpoint.disks import find_disks
    from harness.checkpoint.memory import open_memory
    from harness.checkpoint.reshard import load_engines
    from harness.checkpoint.save import Saver
    from harness.control.live import LiveConfig
    from harness.data.step_batches import StepBatches
    from harness.data.train_batches import train_batches
    from harness.engine.build import build_engines
    from harness.task import load_task
    from harness.utils import to_device

    task = load_task(config)
    rank, world_size = distributed.global_rank(), distributed.world_size()
    batches = train_batches(task.train_data, config.data, task.collate, 0, rank, world_size)
    engines, position = build_engines(task, config), StepBatches(batches)
    engines.step(to_device(next(batches), distributed.device()))
    disks = find_disks(config.run_dir)
    memory = open_memory(config, disks)
    assert memory is not None
    if disks.is_leader:
        (config.run_dir / "control").mkdir(parents=True, exist_ok=True)
    memory.begin(config.run_dir, disks, None)
    background = Config.model_validate(
        merge(config.model_dump(), {"checkpoint": {"background": True}})
    )
    saver = Saver(engines, position, LiveConfig(config), disks, Callbacks([]), memory=memory)
    behind = Saver(engines, position, LiveConfig(background), disks, Callbacks([]))
    saver.save({})
    saver.save_in_memory()
    (on_disk,), (in_memory,) = (
        parent.glob("step-*") for parent in (saver.directory, memory.directory)
    )

    def forget() -> None:
        """Drops the files from the system's memory."""
        for path in on_disk.rglob("*.pt") if rank == 0 else ():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        distributed.barrier()

    def load(directory: Path) -> None:
        verify_checkpoint(directory)
        load_engines(engines, directory, common_manifest(directory))

    ways: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "save on the disk": (lambda: None, lambda: saver.save({})),
        "save in the background": (behind.wait, lambda: behind.save({})),
        "keep in memory": (lambda: None, saver.save_in_memory),
        "load from memory": (lambda: None, lambda: load(in_memory)),
        "load from the disk": (lambda: None, lambda: load(on_disk)),
        "load from the disk, cold": (forget, lambda: load(on_disk)),
    }
    found: Seconds = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, (prepare, way) in ways.items():
            behind.wait()
            prepare()
            distributed.barrier()
            started = time.perf_counter()
            way()
            distributed.barrier()
            if number:  # the first round allocates
                found[name].append(time.perf_counter() - started)
    found["bytes"] = [float(sum(f.stat().st_size for f in on_disk.rglob("*.pt")))]
    memory.remove()
    engines.close()
    return found


def main() -> None:
    """Runs the rounds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stage", type=int, default=1)
    parser.add_argument("--width", type=int, default=9200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=None)
    args = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="bench-memory-", dir=args.directory))
    try:
        with RankPool(args.ranks, timeout_s=1200) as pool:
            config = config_of(directory, args.stage, args.width)
            seconds = pool.run(measure, config, args.rounds)[0]
    finally:
        shutil.rmtree(directory)
    size = seconds.pop("bytes")[0]
    sys.stdout.write(f"ZeRO {args.stage}, {size / 1e9:.2f} GB, {args.ranks} ranks\n")
    for name, values in seconds.items():
        reference = seconds["save on the disk" if "load" not in name else "load from the disk"]
        ratio = statistics.median(values) / statistics.median(reference)
        spread = f"{min(values):.2f} .. {max(values):.2f}"
        middle = statistics.median(values)
        sys.stdout.write(f"{name:<26} {middle:7.2f} s  {ratio:5.2f} x the disk   ({spread})\n")
    text = f"{size / 1e9:.2f} GB"
    on_disk, cold = seconds["save on the disk"], seconds["load from the disk, cold"]
    tell_pair(f"keeping {text} in memory", "s", seconds["keep in memory"], "a synced save", on_disk)
    loads = seconds["load from memory"]
    tell_pair(f"a start from {text} in memory", "s", loads, "from the disk, cold", cold)


if __name__ == "__main__":
    main()
