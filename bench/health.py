"""The cost of the watchdog, the phases and the ranks' times, per step.

    python -m bench.health [--steps 200] [--step-ms 50] [--rounds 6]

Two ranks take steps of `--step-ms` (asleep, as while a GPU works) of 8 micro-batches, with the
step's vector, in alternating blocks: with what harness does for its health in a step, and without.
Prints the time that a step takes besides the sleep, on the slower rank (median over the steps and
the blocks), the CPU time of its thread, which a busy machine changes less, their differences
relative to the step, and the CPU time of the watchdogs' processes.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp

import psutil

from bench.rows import Row, tell
from harness.testing.pool import RankPool

MICRO_BATCHES = 8


def measure(steps: int, step_s: float, rounds: int, directory: Path) -> dict[str, list[float]]:
    """Seconds a step of each way besides the sleep, and of CPU time, by block, on this rank; and
    the share of a core that the watchdog takes."""
    from harness import distributed
    from harness.config import Config
    from harness.distributed import StepVector
    from harness.health import phases, watchdog
    from harness.health.stragglers import Pace
    from harness.metrics.by_rank import ByRank
    from harness.metrics.step_clock import StepClock

    root = Path(__file__).parents[1]
    config = Config.model_validate(
        {
            "run": {"dir": directory},
            "task": {"path": str(root / "launch/tasks/byte_lm.py")},
            "engines": {
                "lm": {
                    "ds_config": str(root / "ds_configs/zero2.json"),
                    "optimizer": {"name": "adamw", "lr": 1e-3},
                }
            },
        }
    )

    class Others:
        """What the vector has anyway."""

        def contribute(self) -> list[float]:
            return [1.0] * 20

        def receive(self, sums: Sequence[float]) -> None:
            pass

    class RanksTimes:
        """The ranks' times in the vector, and what is judged by them."""

        def __init__(self) -> None:
            self.by_rank, self.pace, self.clock = ByRank(), Pace(lambda text: None), StepClock()

        def contribute(self) -> Sequence[float]:
            self.clock.stop()
            return self.by_rank.tell(self.clock, {"host_memory_bytes": 0})

        def receive(self, sums: Sequence[float]) -> None:
            self.by_rank.hear(sums)
            self.pace.judge(step, self.by_rank.times)

    bare, full, of_ranks = StepVector(), StepVector(), RanksTimes()
    for vector in (bare, full):
        vector.add(Others())
    full.add(of_ranks)
    step = 0

    def with_health() -> None:
        nonlocal step
        step += 1
        phases.at_step(step)
        for _ in range(MICRO_BATCHES):
            phases.enter("data")
            phases.enter("step")
            phases.enter("forward")
            phases.enter("backward")
            phases.enter("step")
        full.exchange()
        of_ranks.clock = StepClock()  # of the next step, with its sleep

    ways = {"with": with_health, "without": bare.exchange}
    seconds: dict[str, list[float]] = {f"{name}{cpu}": [] for name in ways for cpu in ("", " CPU")}
    with watchdog.watched(config, may_end=False):
        watchdog.join()
        (process,) = psutil.Process().children()
        began, used = time.monotonic(), sum(process.cpu_times()[:2])
        for _ in range(rounds):
            for name, way in ways.items():
                distributed.barrier()
                times, used_times = [], []
                for _ in range(steps):
                    time.sleep(step_s)
                    started, used_before = time.perf_counter(), time.thread_time()
                    way()
                    used_times.append(time.thread_time() - used_before)
                    times.append(time.perf_counter() - started)
                seconds[name].append(statistics.median(times))
                seconds[f"{name} CPU"].append(statistics.median(used_times))
                bare.wait()
                full.wait()
        used = sum(process.cpu_times()[:2]) - used
        seconds["share"] = [used / (time.monotonic() - began)]
    return seconds


def main() -> None:
    """Runs the blocks and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--step-ms", type=float, default=50)
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    step_s = args.step_ms / 1000
    with RankPool(2, timeout_s=1200) as pool:
        per_rank = pool.run(measure, args.steps, step_s, args.rounds, Path(mkdtemp()))
    medians = {
        name: max(statistics.median(rank[name]) for rank in per_rank) for name in per_rank[0]
    }
    for kind in ("", " CPU"):
        full, bare = medians[f"with{kind}"], medians[f"without{kind}"]
        sys.stdout.write(
            f"{kind.strip() or 'elapsed'}: with {full * 1e6:.0f} us, without {bare * 1e6:.0f} us a "
            f"step: {(full - bare) * 1e6:.0f} us, {(full - bare) / step_s:.3%} of "
            f"{args.step_ms:g} ms\n"
        )
    added = 1e3 * (medians["with CPU"] - medians["without CPU"])
    note = f"{added / args.step_ms:.2%} of {args.step_ms:g} ms, CPU time"
    tell(Row("watchdog, phases and ranks' times, a step", added, "ms", note=note))
    sys.stdout.write(f"the watchdog's process takes {medians['share']:.2%} of a core\n")


if __name__ == "__main__":
    main()
