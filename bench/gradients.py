"""The cost of comparing which gradients arrive, and in which order, on every rank.

    python -m bench.gradients [--rounds 20] [--steps 3] [--stages 1,2,3] [--parameters 300,3000]

One process takes training steps of a model of so many parameters under DeepSpeed, in blocks with
the recording and the step's digest, and without, in turn. Prints the CPU time inside of the added
code (the least, as on a quiet machine; relative to a step of 50 ms), and the ratio of the CPU times
of a step with and without it (median and quartiles). Digests travel in a vector that is sent
anyway. Then the same time of checking that `requires_grad` is what it was at the start.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from bench.rows import Row, tell
from harness.testing.pool import RankPool

STEP_S = 0.05
"""A short step, to which the cost is related."""


def build(stage: int, parameters: int) -> tuple[Any, Any]:
    """`(engine under DeepSpeed, batch)`: layers of two parameters each, one after another."""
    import deepspeed
    import torch
    from torch import nn

    layers = [nn.Linear(8, 8) for _ in range(parameters // 2)]
    model = nn.Sequential(*layers)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "steps_per_print": 2**31,
        "zero_optimization": {"stage": stage},
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ds = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    return ds, torch.randn(4, 8)


def replaced(*owners: Any) -> list[tuple[Any, str, Any]]:
    """The methods that are replaced on these objects, as `(object, name, new method)`."""
    return [
        (owner, name, value)
        for owner in owners
        for name, value in vars(owner).items()
        if callable(value) and callable(getattr(type(owner), name, None))
    ]


class Stopwatch:
    """Adds up the CPU time inside of functions, the outermost only."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.is_running = False

    def timed(self, owner: Any, *names: str) -> None:
        """Measures the methods `names` of an object from now on."""
        for name in names:
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if self.is_running:
                return function(*args)
            self.is_running, started = True, time.thread_time()
            result = function(*args)
            self.seconds += time.thread_time() - started
            self.is_running = False
            return result

        return run


def measure(stage: int, parameters: int, rounds: int, steps: int) -> list[tuple[float, ...]]:
    """By round: CPU seconds a step with the check and without; those inside of it at its fastest
    step, the one that other processes have disturbed least."""
    from harness.engine.gradient_check import GradientCheck
    from harness.zero.arrivals import Arrivals

    ds, batch = build(stage, parameters)
    before = replaced(ds, ds.optimizer)
    check, watch = GradientCheck(), Stopwatch()
    watch.timed(Arrivals, "_note", "_complete")
    arrivals = Arrivals(ds, in_order=False)
    methods = [found for found in replaced(ds, ds.optimizer) if found not in before]
    watch.timed(arrivals._buckets, "prepare", "pending")
    watch.timed(check, "record", "contribute")
    engine: Any = argparse.Namespace(name="net", arrivals=arrivals)
    taken = 0

    def with_check(loss: Any) -> None:
        nonlocal taken
        watch.seconds = 0.0
        arrivals.backward(loss)
        ds.step()
        taken += 1
        check.record(taken, [engine])
        check.contribute()
        inside.append(watch.seconds)

    def without(loss: Any) -> None:
        ds.backward(loss)
        ds.step()

    def block(step: Callable[[Any], None]) -> float:
        started = time.thread_time()
        for _ in range(steps):
            step(ds(batch).square().mean())
        return (time.thread_time() - started) / steps

    inside: list[float] = []
    found = []
    for _ in range(rounds):
        for owner, name, method in methods:
            setattr(owner, name, method)
        inside.clear()
        slow = block(with_check)
        for owner, name, _ in methods:
            delattr(owner, name)
        found.append((slow, block(without), min(inside)))
    ds.destroy()
    return found[2:]


def check_trained(parameters: int, rounds: int = 1000) -> float:
    """The least CPU seconds of the step's check of `requires_grad`."""
    from torch import nn

    from harness.engine.trainable import TrainedParameters

    trained = TrainedParameters(
        "net", nn.ParameterList(nn.Linear(8, 8).weight for _ in range(parameters))
    )

    def seconds() -> float:
        started = time.thread_time()
        trained.check()
        return time.thread_time() - started

    return min(seconds() for _ in range(rounds))


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def share(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us a step, {seconds / STEP_S:.3%} of {STEP_S * 1e3:g} ms"


def line(stage: int, parameters: int, found: Sequence[tuple[float, ...]]) -> str:
    ratios = [slow / fast for slow, fast, _ in found]
    low, middle, high = statistics.quantiles(ratios, n=4)
    inside = min(seconds for *_, seconds in found)
    step = statistics.median(fast for _, fast, _ in found)
    return (
        f"ZeRO {stage}, {parameters} parameters: {share(inside)}; with / without: {middle:.4f} "
        f"({low:.4f} to {high:.4f}) of {step * 1e3:.1f} ms\n"
    )


def main() -> None:
    """Measures each stage and size, and prints a line for it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--stages", type=numbers, default=[1, 2, 3])
    parser.add_argument("--parameters", type=numbers, default=[300, 3000])
    args = parser.parse_args()
    with RankPool(1, timeout_s=1200) as pool:
        for parameters in args.parameters:
            for stage in args.stages:
                [found] = pool.run(measure, stage, parameters, args.rounds + 2, args.steps)
                sys.stdout.write(line(stage, parameters, found))
                inside = 1e3 * min(seconds for *_, seconds in found)
                claim = f"comparing the gradients' order, {parameters} parameters, ZeRO {stage}"
                tell(Row(claim, inside, "ms", note=f"{inside / STEP_S / 10:.2f} % of 50 ms"))
                sys.stdout.flush()
            seconds = check_trained(parameters)
            sys.stdout.write(f"requires_grad, {parameters} parameters: {share(seconds)}\n")


if __name__ == "__main__":
    main()
