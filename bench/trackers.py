"""What experiment trackers cost a step, beside logging from the loop as their examples do.

    python -m bench.trackers [--steps 200] [--step-ms 10] [--rounds 5] [--numbers 30]

A loop of steps that compute for about `--step-ms` on one thread takes turns in blocks: without a
tracker; with harness's queue, whose thread sends meanwhile; and with the library called in every
step. Prints the time that a step takes longer by each, in the mean, so that what the thread takes
from the loop counts as well, and the time of the call alone. Of the trackers that are installed:
W&B offline, MLflow in files, trackio in a local database.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

import torch

from bench.rows import tell_pair
from harness.metrics.tracker_sink import TrackerSink
from harness.metrics.trackers import TRACKERS, TrackedRun, Tracker

Write = Callable[[Mapping[str, float]], None]


class Loop:
    """Steps of a computation, and a call at the end of each."""

    def __init__(self, step_s: float, numbers: int):
        self._matrix = torch.rand(256, 256)
        self._count = 1
        while (once := self._compute_s()) < step_s:
            self._count = max(self._count + 1, int(self._count * step_s / once))
        self._numbers = numbers
        self._step = 0

    def _compute_s(self) -> float:
        began = time.perf_counter()
        for _ in range(self._count):
            torch.mm(self._matrix, self._matrix)
        return time.perf_counter() - began

    def block(self, steps: int, write: Write) -> tuple[float, float]:
        """Seconds of a step, and of them in the call; both in the mean."""
        in_calls, began = 0.0, time.perf_counter()
        for _ in range(steps):
            self._step += 1
            self._compute_s()
            record = {f"stat{n}": n / self._step for n in range(self._numbers)}
            called = time.perf_counter()
            write({"step": self._step, "time": 1e9 + self._step, **record})
            in_calls += time.perf_counter() - called
        return (time.perf_counter() - began) / steps, in_calls / steps


def opened(name: str, directory: Path, group: str) -> tuple[Tracker, TrackedRun]:
    """A tracker that writes to a directory, not yet opened, and its run."""
    os.environ |= {"WANDB_MODE": "offline", "TRACKIO_DIR": str(directory / "trackio")}
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    return TRACKERS[name](), TrackedRun("bench", group, 0, {}, directory)


def measure(name: str, loop: Loop, steps: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Of each way, by round, what `Loop.block` returns."""
    found: dict[str, list[tuple[float, float]]] = {"none": [], "queue": [], "call": []}
    with tempfile.TemporaryDirectory() as scratch:
        sink = TrackerSink(name, *opened(name, Path(scratch), "queue"))
        tracker, run = opened(name, Path(scratch), "call")
        tracker.open(run)
        ways: dict[str, Write] = {
            "none": lambda record: None,
            "queue": sink.write,
            "call": lambda record: tracker.log([record]),
        }
        for _ in range(rounds):
            for way, write in ways.items():
                found[way].append(loop.block(steps, write))
                time.sleep(1.5)  # what the thread has left is not the next block's
        tracker.close()
        sink.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--step-ms", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--numbers", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(1)
    loop = Loop(args.step_ms / 1000, args.numbers)
    for name in TRACKERS:
        if find_spec(name) is None:
            sys.stdout.write(f"{name}: not installed\n")
            continue
        found = measure(name, loop, args.steps, args.rounds)
        for way, what in (("queue", "harness's queue"), ("call", f"{name} called in the loop")):
            pairs = zip(found[way], found["none"], strict=True)
            longer = [1e3 * (step - bare) for (step, _), (bare, _) in pairs]
            calls = [1e6 * call for _, call in found[way]]
            sys.stdout.write(
                f"{name}: {what}: the call {statistics.median(calls):.0f} us ({min(calls):.0f} to "
                f"{max(calls):.0f}), a step {statistics.median(longer):+.3f} ms "
                f"({min(longer):+.3f} to {max(longer):+.3f})\n"
            )
        queue, call = ([1e3 * seconds for _, seconds in found[way]] for way in ("queue", "call"))
        tell_pair(f"{args.numbers} numbers to {name}", "ms", queue, "its log() in the loop", call)


if __name__ == "__main__":
    main()
