"""The cost of broadcasting the buffers that training changes: engines.NAME.buffers = "sync".

    python -m bench.buffers [--layers 53] [--steps 20] [--rounds 8]

Two ranks train a net with a BatchNorm in every layer, three buffers each, under ZeRO 1, in
alternating blocks of steps: with and without the broadcast. Prints the milliseconds of a step, by
the clock and of the process's CPU time (mean of a block, median over the blocks), and the ratio of
both ways, with its range over the pairs of blocks; the broadcast alone; and the search for changed
buffers.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

from bench.rows import tell_pair
from harness.testing.pool import RankPool

Figures = dict[str, list[tuple[float, float]]]


def measure(layers: int, steps: int, rounds: int, width: int) -> Figures:
    """`(seconds, CPU seconds)` per step of every block, by way, on this rank."""
    import deepspeed
    import torch
    from torch import nn

    from harness import distributed
    from harness.engine.buffers import Buffers, sync

    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        for _ in range(layers)
    ]
    model = nn.Sequential(*blocks)
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(model.parameters())
    ds = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
    buffers = Buffers("net", model, "sync")
    images = torch.randn(4, width, 16, 16)

    def step() -> None:
        ds.backward(ds(images).square().mean())
        ds.step()

    for number in (0, 1):
        sync([buffers], number, search=True)
        step()

    def sync_and_step() -> None:
        sync([buffers], 3, search=False)
        step()

    ways: dict[str, Callable[[], object]] = {
        "without": step,
        "sync": sync_and_step,
        "broadcast alone": lambda: sync([buffers], 3, search=False),
        "search alone": lambda: buffers.search(3),
    }
    assert len(buffers.changed) == 3 * layers
    seconds: Figures = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            distributed.barrier()
            started, cpu = time.perf_counter(), time.process_time()
            for _ in range(steps):
                way()
            distributed.barrier()
            elapsed, cpu = time.perf_counter() - started, time.process_time() - cpu
            seconds[name].append((elapsed / steps, cpu / steps))
    ds.destroy()
    return seconds


def main() -> None:
    """Runs the rounds and prints the figures of the slower rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=53)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--width", type=int, default=32)
    args = parser.parse_args()
    with RankPool(2, timeout_s=1200) as pool:
        per_rank = pool.run(measure, args.layers, args.steps, args.rounds, args.width)
    for number, clock in enumerate(("clock", "CPU")):
        seconds = {
            name: [max(pair[number] for pair in pairs) for pairs in zip(*blocks, strict=True)]
            for name in per_rank[0]
            for blocks in [[figures[name] for figures in per_rank]]
        }
        ratios = [a / b for a, b in zip(seconds["sync"], seconds["without"], strict=True)]
        each = ", ".join(f"{n} {statistics.median(s) * 1e3:.2f} ms" for n, s in seconds.items())
        low, high = min(ratios), max(ratios)
        ratio = f"{statistics.median(ratios):.3f} ({low:.3f} .. {high:.3f})"
        ours, bare = ([1e3 * s for s in seconds[name]] for name in ("sync", "without"))
        tell_pair(f"a step that broadcasts buffers, {clock} time", "ms", ours, "without", bare)
        sys.stdout.write(f"{clock}: {each}; sync / without {ratio}\n")


if __name__ == "__main__":
    main()
