"""The cost of a Muon step, compared with torch's Muon and, under ZeRO, with DeepSpeed's.

    python -m bench.muon [--rounds 3] [--sizes 256 512]

Alone: milliseconds of `step()` for matrices of one size, each optimizer in turn, the best of all
rounds. torch.optim.Muon always iterates in bf16; ours in bf16 and in fp32, its default on CPUs,
which the table of `python -m bench` has: not every CPU multiplies bf16 in hardware.
On 2 ranks: milliseconds of backward and step, where DeepSpeed's works in both (compiled kernels
disabled: they would be compiled for minutes), and the bytes that a rank passes to collectives in
them. DeepSpeed's iterates in 16 bits where the CPU can, with its default, "gram".
"""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bench.rows import Row, tell
from harness.optim import Muon
from harness.testing.pool import RankPool

COLLECTIVES = (
    "all_to_all_single",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "all_reduce",
    "all_gather",
    "reduce",
    "broadcast",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512])
    options = parser.parse_args()
    say("| matrices | torch, bf16 | ours, bf16 | ratio | ours, fp32 |\n|---|--:|--:|--:|--:|")
    for size in options.sizes:
        theirs, half, single = alone(size, options.rounds)
        say(
            f"| {shapes_text(size)} | {theirs:.1f} | {half:.1f} | {half / theirs:.2f} | "
            f"{single:.1f} |"
        )
        tell(Row(f"a step of Muon, {shapes_text(size)}", single, "ms", "torch's", theirs))
    say("\n| matrices | ZeRO | DeepSpeed's | bf16 | ratio | fp32 | DeepSpeed's, MB | ours, MB |")
    say("|---|--:|--:|--:|--:|--:|--:|--:|")
    with RankPool(2, 1e5) as pool:
        for size in options.sizes:
            for stage in (2, 3):
                (theirs, sent), _ = pool.run(under_zero, size, stage, "", options.rounds)
                (half, own), _ = pool.run(under_zero, size, stage, "bf16", options.rounds)
                (single, _), _ = pool.run(under_zero, size, stage, "fp32", options.rounds)
                say(
                    f"| {shapes_text(size)} | {stage} | {theirs:.1f} | {half:.1f} | "
                    f"{half / theirs:.2f} | {single:.1f} | {sent / 1e6:.2f} | {own / 1e6:.2f} |"
                )
                claim = f"the same at ZeRO {stage}, {shapes_text(size)}"
                tell(Row(claim, single, "ms", "DeepSpeed's", theirs))


def shapes_of(size: int) -> list[tuple[int, int]]:
    """A block of a transformer, and more of them where they are small."""
    block = [*[(size, size)] * 4, (8 * size // 3, size), (size, 8 * size // 3)]
    return block * max(1, 512 // size)


def shapes_text(size: int) -> str:
    count = len(shapes_of(size)) // 6
    return f"{4 * count} x {size} x {size}, {2 * count} x {8 * size // 3} x {size}"


def alone(size: int, rounds: int) -> tuple[float, float, float]:
    """Milliseconds of torch's Muon, ours in bf16, and ours in fp32."""
    makers: list[Callable[[list[nn.Parameter]], Any]] = [
        lambda p: torch.optim.Muon(p, weight_decay=0.0),
        lambda p: Muon(p, ns_dtype="bf16"),
        lambda p: Muon(p),
    ]
    optimizers = []
    for make in makers:
        parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes_of(size)]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizers.append(make(parameters))
        optimizers[-1].step()
    best = [float("inf")] * len(optimizers)
    for _ in range(rounds):
        for number, optimizer in enumerate(optimizers):
            best[number] = min(best[number], milliseconds(optimizer.step))
    return best[0], best[1], best[2]


class Layers(nn.Module):
    """Matrices, each of which gets an input of its own."""

    def __init__(self, size: int) -> None:
        super().__init__()
        linear = [nn.Linear(columns, rows, bias=False) for rows, columns in shapes_of(size)]
        self.layers = nn.ModuleList(linear)

    def forward(self, x: Tensor) -> Tensor:
        outputs = [layer(x[:, : layer.in_features]).square().mean() for layer in self.layers]  # type: ignore
        return torch.stack(outputs).sum()


def under_zero(size: int, stage: int, ours: Any, rounds: int) -> tuple[float, int]:
    """The milliseconds of backward and step, and the bytes that this rank passes to collectives.

    `ours`: the dtype of our Newton-Schulz; empty for DeepSpeed's Muon.
    """
    import deepspeed

    from harness.zero.muon import build_muon

    torch._dynamo.config.disable = True  # type: ignore[attr-defined]
    model = Layers(size)
    parameters = list(model.parameters())
    if ours:
        optimizer: Any = Muon(parameters, ns_dtype=ours)
    else:
        settings = {"lr": 1e-3, "momentum": 0.95}
        optimizer = build_muon(parameters, [], weight_decay=0.0, muon=settings, adam={})
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    if stage == 3 and not ours:
        zero["reduce_scatter"] = False
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }
    engine: Any = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    best, sent = float("inf"), [0]

    def counting(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            given = [*args, *options.values()]
            tensors = [value for value in given if isinstance(value, Tensor)]
            sent[0] += min(tensor.nbytes for tensor in tensors)
            return collective(*args, **options)

        return call

    for number in range(rounds + 2):
        loss = engine(torch.randn(1, 8 * size // 3))
        originals = {name: getattr(dist, name) for name in COLLECTIVES}
        if number == 1:
            sent[0] = 0
            for name, collective in originals.items():
                setattr(dist, name, counting(collective))

        def step() -> None:
            engine.backward(loss)  # noqa: B023
            engine.step()

        taken = milliseconds(step)
        for name, collective in originals.items():
            setattr(dist, name, collective)
        if number > 1:
            best = min(best, taken)
    engine.destroy()
    return best, sent[0]


def milliseconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
