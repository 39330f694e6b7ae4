"""The cost of the watchdog, the phases and the ranks' times, per step.

    python bench/health.py [--steps 200] [--step-ms 50] [--rounds 6]

Two ranks take steps of `--step-ms` (asleep, as while a GPU works) of 8 micro-batches, with the
step's vector, in alternating blocks: with what harness does for its health in a step, and without.
Prints the time that a step takes besides the sleep, on the slower rank (median over the steps and
the blocks), their difference relative to the step, and the CPU time of the watchdogs' processes.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp

import psutil

from harness.testing.pool import RankPool

MICRO_BATCHES = 8


def measure(steps: int, step_s: float, rounds: int, directory: Path) -> dict[str, list[float]]:
    """Seconds a step of each way besides the sleep, by block, on this rank; and the share of a core
    that the watchdog takes."""
    from harness import distributed
    from harness.config import Config
    from harness.distributed import StepVector
    from harness.health import phases, watchdog
    from harness.health.stragglers import Pace

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

    bare, full, pace = StepVector(), StepVector(), Pace(lambda text: None)
    for vector in (bare, full):
        vector.add(Others())
    full.add(pace)
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
        pace.of_step(step - 1)

    seconds: dict[str, list[float]] = {"with": [], "without": []}
    with watchdog.watched(config, may_end=False):
        watchdog.join()
        (process,) = psutil.Process().children()
        began, used = time.monotonic(), sum(process.cpu_times()[:2])
        for _ in range(rounds):
            for name, way in (("with", with_health), ("without", bare.exchange)):
                distributed.barrier()
                times = []
                for _ in range(steps):
                    time.sleep(step_s)
                    started = time.perf_counter()
                    way()
                    times.append(time.perf_counter() - started)
                seconds[name].append(statistics.median(times))
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
    cost = medians["with"] - medians["without"]
    sys.stdout.write(
        f"with {medians['with'] * 1e6:.0f} us, without {medians['without'] * 1e6:.0f} us a step: "
        f"{cost * 1e6:.0f} us, {cost / step_s:.3%} of {args.step_ms:g} ms; the watchdog's process "
        f"takes {medians['share']:.2%} of a core\n"
    )


if __name__ == "__main__":
    main()
