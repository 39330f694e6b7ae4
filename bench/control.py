"""The cost of live control per step without commands.

    python -m bench.control [--steps 300] [--step-ms 20] [--rounds 3]

Two and four ranks take steps of `--step-ms` (asleep, as while a GPU works). After each they poll
for commands: by the bus, or by a blocking `broadcast_object_list`. Prints the time of a poll on the
rank that waits longest (mean over the steps of a round, median over the rounds), also relative to
the step, and the ratio of the two ways.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

from bench.rows import Row, tell
from harness.testing.pool import RankPool


def measure(steps: int, step_s: float, rounds: int) -> dict[str, float]:
    """Seconds per poll of each way, in interleaved rounds, on this rank."""
    from harness import distributed
    from harness.control.bus import Bus
    from harness.control.grammar import Grammar
    from harness.control.signals import Signals

    bus = Bus(Grammar(["net"], {}), Signals(), lambda query: (str(query), None), None)
    vector = distributed.StepVector()
    vector.add(bus)

    def poll(step: int) -> object:
        vector.exchange()
        return bus.poll(step)

    ways: dict[str, Callable[[int], object]] = {
        "bus": poll,
        "broadcast_object_list": lambda step: distributed.broadcast(None),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            distributed.barrier()
            elapsed = 0.0
            for step in range(steps):
                time.sleep(step_s)
                started = time.perf_counter()
                way(step)
                elapsed += time.perf_counter() - started
            seconds[name].append(elapsed / steps)
            vector.wait()
    bus.close()
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    """Runs the rounds and prints a line for each number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--step-ms", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    step_s = args.step_ms / 1000
    for ranks in (2, 4):
        with RankPool(ranks, timeout_s=1200) as pool:
            per_rank = pool.run(measure, args.steps, step_s, args.rounds)
        bus = max(times["bus"] for times in per_rank)
        other = max(times["broadcast_object_list"] for times in per_rank)
        sys.stdout.write(
            f"{ranks} ranks: bus {bus * 1e6:.0f} us a step ({bus / step_s:.2%} of "
            f"{args.step_ms:g} ms), broadcast_object_list {other * 1e6:.0f} us: "
            f"{other / bus:.1f} times as much\n"
        )
        claim = f"live control on {ranks} ranks, a step without commands"
        other_ms, note = other * 1e3, f"{bus / step_s:.1%} of a step of {args.step_ms:g} ms"
        tell(Row(claim, bus * 1e3, "ms", "broadcast_object_list", other_ms, note=note))


if __name__ == "__main__":
    main()
