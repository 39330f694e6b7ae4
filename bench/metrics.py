"""The cost of reported numbers: `--numbers` in each of `--micro-batches` of a step.

    python -m bench.metrics [--numbers 100] [--micro-batches 32] [--steps 20] [--rounds 5]

Two ranks report tensors on their device, and take turns in blocks of steps with the step's vector,
and with a float for every number (`float(tensor)`) and one `all_reduce` a step, as a plain loop
does. Prints the time a step of both on the slower rank (median over the rounds, and the range).
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

from bench.rows import tell_pair
from harness.testing.pool import RankPool


def measure(numbers: int, micro_batches: int, steps: int, rounds: int) -> dict[str, list[float]]:
    """Seconds a step of each way, by round, on this rank."""
    import torch
    import torch.distributed as dist

    from harness import distributed
    from harness.metrics.meters import StepMeter

    device = distributed.device()
    values = torch.rand(micro_batches, numbers, device=device)
    reports = [{f"stat{n}": row[n] for n in range(numbers)} for row in values]
    meter, vector = StepMeter(), distributed.StepVector()
    vector.add(meter)

    def with_vector() -> None:
        meter.begin()
        for report in reports:
            meter.add(report)
        meter.push({}, ["net"], 1, 1)
        vector.exchange()
        meter.take()

    def with_floats() -> None:
        sums = [0.0] * numbers
        for report in reports:
            for n, value in enumerate(report.values()):
                sums[n] += float(value)
        dist.all_reduce(torch.tensor(sums), group=distributed.control_group())

    ways: dict[str, Callable[[], None]] = {"vector": with_vector, "floats": with_floats}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(rounds):
        for name, way in ways.items():
            distributed.barrier()
            started = time.perf_counter()
            for _ in range(steps):
                way()
            seconds[name].append((time.perf_counter() - started) / steps)
        vector.drain()
    return seconds


def main() -> None:
    """Runs the rounds and prints a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--numbers", type=int, default=100)
    parser.add_argument("--micro-batches", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with RankPool(2, timeout_s=600) as pool:
        per_rank = pool.run(measure, args.numbers, args.micro_batches, args.steps, args.rounds)
    medians, blocks = {}, {}
    for name in ("vector", "floats"):
        slowest = [max(rounds) for rounds in zip(*(rank[name] for rank in per_rank), strict=True)]
        medians[name] = statistics.median(slowest)
        blocks[name] = [1e3 * seconds for seconds in slowest]
        sys.stdout.write(
            f"{name}: {medians[name] * 1e3:.2f} ms a step "
            f"({min(slowest) * 1e3:.2f} to {max(slowest) * 1e3:.2f}), "
            f"{medians[name] / args.numbers / args.micro_batches * 1e6:.2f} us a number\n"
        )
    claim = f"{args.numbers} numbers in {args.micro_batches} micro-batches, a step"
    tell_pair(claim, "ms", blocks["vector"], "a float for each", blocks["floats"])
    sys.stdout.write(f"vector / floats: {medians['vector'] / medians['floats']:.2f}\n")


if __name__ == "__main__":
    main()
