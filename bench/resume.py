"""Resuming about 1 GB of state of 2 ranks, on the same and on other numbers of ranks.

    python -m bench.resume [--ranks 2 1 4] [--stage 1] [--width 9200] [--rounds 3]
                           [--directory DIR]

Prints, on the same ranks, the seconds in which a run builds its engines, and those in which it then
has its state, checked ahead (`verify_ahead`) and not, beside `load_checkpoint`. Then the seconds of
DeepSpeed's `load_checkpoint` on the same ranks, and on each number of ranks those of checking the
checksums and of loading, on the slowest rank, as medians of interleaved rounds with a warm cache;
and a rank's peak memory above what it was before it loads, as the ratio to the masters and moments
that it loads. A load frees the state of the one before it.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.rows import Row, tell
from harness.config import Config
from harness.testing.pool import RankPool

ROOT = Path(__file__).parent.parent
THEIRS = "load_checkpoint"
Measured = dict[str, list[tuple[float, float, float]]]
"""By way and round: seconds, CPU seconds of a rank, and bytes of memory at the peak."""


def config_of(directory: Path, stage: int, width: int) -> Config:
    """A run of one wide layer."""
    table = {
        "run": {"name": "bench", "dir": directory},
        "task": {"path": str(ROOT / "tests/tasks/tiny_task.py"), "args": {"width": width}},
        "engines": {
            "net": {
                "ds_config": ROOT / f"ds_configs/zero{stage}.json",
                "optimizer": {"name": "adamw"},
            }
        },
        "data": {"micro_batch_size": 1},
    }
    return Config.model_validate(table)


def save(config: Config) -> None:
    """Saves the state after a step."""
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

    task = load_task(config)
    rank, world_size = distributed.global_rank(), distributed.world_size()
    batches = train_batches(task.train_data, config.data, task.collate, 0, rank, world_size)
    engines = build_engines(task, config)
    engines.step(to_device(next(batches), distributed.device()))
    disks = find_disks(config.run_dir)
    Saver(engines, StepBatches(batches), LiveConfig(config), disks, Callbacks([])).save({})
    engines.close()


def load(config: Config, rounds: int) -> Measured:
    """Loads it in all ways."""
    from harness import distributed
    from harness.checkpoint.completeness import common_manifest, verify_checkpoint
    from harness.checkpoint.reshard import load_engines
    from harness.engine.build import build_engines
    from harness.task import load_task

    (directory,) = (config.run_dir / "checkpoints").glob("step-*")
    engines = build_engines(load_task(config), config)
    manifest = common_manifest(directory)
    ways: dict[str, Callable[[], object]] = {
        "check": lambda: verify_checkpoint(directory),
        "load": lambda: load_engines(engines, directory, manifest),
    }
    if manifest.world_size == distributed.world_size():
        ds = engines["net"].ds
        ways[THEIRS] = lambda: ds.load_checkpoint(str(directory), tag="net")
    found: Measured = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            distributed.barrier()
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
            before = _memory("VmRSS")
            started, used = time.perf_counter(), time.process_time()
            way()
            seconds, used = time.perf_counter() - started, time.process_time() - used
            peak = _memory("VmHWM") - before
            if number:
                found[name].append((seconds, used, float(peak)))
            elif name == "load":  # into an engine without state
                found["first load"] = [(seconds, used, float(peak))]
    engines.close()
    return found


def start(config: Config, rounds: int) -> Measured:
    """Builds the engines, and loads the checkpoint into them, in all ways."""
    from harness import distributed
    from harness.checkpoint.completeness import Verify, verify_checkpoint
    from harness.checkpoint.files import verify_file
    from harness.checkpoint.reshard import load_engines
    from harness.checkpoint.verify_ahead import VerifyAhead
    from harness.engine.build import build_engines
    from harness.engine.engines import Engines
    from harness.task import load_task

    (directory,) = (config.run_dir / "checkpoints").glob("step-*")

    def resume(engines: Engines, verify: Verify) -> None:
        load_engines(engines, directory, verify_checkpoint(directory, verify))

    def load_checkpoint(engines: Engines, _: Verify) -> None:
        engines["net"].ds.load_checkpoint(str(directory), tag="net")

    ways = {THEIRS: load_checkpoint, "resume": resume, "resume, checked ahead": resume}
    found: Measured = {f"{what}: {way}": [] for way in ways for what in ("build", "then", "both")}
    for number in range(rounds + 1):
        for name, way in ways.items():
            distributed.barrier()
            clocks = [(time.perf_counter(), time.process_time())]
            ahead = VerifyAhead("latest", directory.parent) if name.endswith("ahead") else None
            engines = build_engines(load_task(config), config)
            distributed.barrier()
            clocks.append((time.perf_counter(), time.process_time()))
            way(engines, ahead.verify if ahead else verify_file)
            distributed.barrier()
            clocks.append((time.perf_counter(), time.process_time()))
            engines.close()
            for what, first, last in (("build", 0, 1), ("then", 1, 2), ("both", 0, 2)):
                seconds, used = (b - a for a, b in zip(clocks[first], clocks[last], strict=True))
                if number:
                    found[f"{what}: {name}"].append((seconds, used, 0.0))
    return found


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    """Saves, loads on each number of ranks, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 1, 4])
    parser.add_argument("--stage", type=int, default=1)
    parser.add_argument("--width", type=int, default=9200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=None)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="bench-resume-", dir=args.directory) as directory:
        config = config_of(Path(directory), args.stage, args.width)
        with RankPool(2, timeout_s=1200) as pool:
            pool.run(save, config)
        files = (f for f in Path(directory).rglob("*") if f.is_file())
        size = sum(f.stat().st_size for f in files)
        sys.stdout.write(f"ZeRO {args.stage}, {size / 1e9:.2f} GB of 2 ranks\n")
        claim, theirs = f"a resume of {size / 1e9:.2f} GB of 2 ranks", 0.0
        for ranks, way in ((2, start), *((ranks, load) for ranks in args.ranks)):
            with RankPool(ranks, timeout_s=1200) as pool:
                per_rank = pool.run(way, config, args.rounds)
            medians: dict[str, float] = {}
            for name in per_rank[0]:
                rounds = zip(*(rank[name] for rank in per_rank), strict=True)
                worst = [tuple(map(max, zip(*round_, strict=True))) for round_ in rounds]
                seconds, used, memory = (sorted(column) for column in zip(*worst, strict=True))
                medians[name] = statistics.median(seconds)
                sys.stdout.write(
                    f"  {ranks} ranks, {name:<28} {statistics.median(seconds):6.2f} s "
                    f"({seconds[0]:.2f} .. {seconds[-1]:.2f}), "
                    f"{statistics.median(used):.2f} s of CPU, +{memory[-1] / 1e6:,.0f} MB\n"
                )
            sys.stdout.flush()
            if way is start:
                ours, theirs = medians["then: resume, checked ahead"], medians[f"then: {THEIRS}"]
                tell(Row(f"{claim}, once engines are built", ours, "s", THEIRS, theirs))
            else:
                ours, theirs = medians["load"], medians.get(THEIRS, theirs)
                tell(Row(f"{claim} on {ranks}, loading alone", ours, "s", THEIRS, theirs))


if __name__ == "__main__":
    main()
