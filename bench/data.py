"""What the order of the samples costs: memory and time per draw against the number of samples.

    python -m bench.data [--draws 20000] [--lengths 1e5,1e7,1e9,1e10]

For each length a fresh process draws from the middle of an epoch, as rank 3 of 8, and continues
from a saved state. Prints the time to the first draw, the time per draw, and the growth of the
resident memory; beside it torch's RandomSampler, where its permutation fits into memory.
"""

import argparse
import multiprocessing
import sys
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import psutil

from bench.rows import Row, tell

MOST_STORED = 10**8
"""Samples up to which torch's sampler is tried: it keeps a list of them all."""


def ours(length: int) -> Iterator[int]:
    """Draws in the middle of an epoch, after a resume."""
    from harness.data import RandomSampler

    stopped = RandomSampler(length, seed=1, rank=3, world_size=8)
    stopped.advance(length // 16)
    sampler = RandomSampler(length, seed=2, rank=3, world_size=8)
    sampler.load_state_dict(stopped.state_dict())
    return sampler.stream()


def torchs(length: int) -> Iterator[int]:
    """Draws in the middle of an epoch: what comes before is skipped."""
    from torch.utils.data import RandomSampler

    sampler = RandomSampler(range(length))
    return islice(iter(sampler), length // 2, None)


def measure(make: Any, length: int, draws: int) -> tuple[float, float, float]:
    """`(seconds to the first draw, microseconds per draw, MiB)`."""
    import numpy
    import torch

    import harness.data

    del numpy, torch, harness
    process = psutil.Process()
    before = process.memory_info().rss
    began = time.perf_counter()
    stream = make(length)
    next(stream)
    first = time.perf_counter() - began
    began = time.perf_counter()
    for _ in islice(stream, draws):
        pass
    each = (time.perf_counter() - began) / draws
    return first, each * 1e6, (process.memory_info().rss - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=20_000)
    parser.add_argument("--lengths", default="1e5,1e7,1e9,1e10")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    sys.stdout.write(f"{'samples':>14} {'':8} {'first draw':>12} {'a draw':>10} {'memory':>11}\n")
    for length in (int(float(text)) for text in options.lengths.split(",")):
        firsts: dict[str, float] = {}
        for name, make in (("harness", ours), ("torch", torchs)):
            if make is torchs and length > MOST_STORED:
                continue
            with context.Pool(1) as pool:
                first, each, memory = pool.apply(measure, (make, length, options.draws))
            firsts[name] = first * 1e3
            sys.stdout.write(
                f"{length:14,} {name:8} {first:10.4f} s {each:7.2f} us {memory:7.1f} MiB\n"
            )
        claim = f"a resume in the middle of {length:,} samples, to the first draw"
        tell(Row(claim, firsts["harness"], "ms", "torch's sampler", firsts.get("torch")))


if __name__ == "__main__":
    main()
