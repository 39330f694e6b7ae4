"""The cost of activation offload and, on a GPU, what it saves.

    python -m bench.offload [--model 1b|7b] [--lengths 8192 32768] [--rounds 5]

On a CPU: the CPU time per region without its computation, for blocks too small to take any:
without checkpointing, with torch's, and offloaded; medians over interleaved rounds.

On a GPU: blocks of the default task in bf16, shaped as those of a model of 1 or 7 billion
parameters, forward and backward of one sequence, without a head, whose logits would hide the rest.
For every way: the peak of the device's memory, the time of a step relative to plain checkpointing
(medians over interleaved rounds), the fraction in which compute waits for copies, and the longest
sequence that fits. `--longest 0` skips the last.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from bench.rows import Row, tell
from harness import offload

SHAPES = {"1b": (2048, 16, 16), "7b": (4096, 32, 32)}
"""Width, layers, heads."""
DEVICE = "cuda"
"""Of the GPU part."""

say = sys.stdout.write


class Tiny(nn.Module):
    """A block that computes next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


def bookkeeping(regions: int, rounds: int) -> dict[str, float]:
    """CPU seconds per region, forward and backward, by way."""
    torch.set_num_threads(1)
    models = {way: nn.ModuleList(Tiny() for _ in range(regions)) for way in ("plain", "offload")}
    offload.attach(models["offload"], fraction="all", keep_last=0, min_bytes=0, host_bytes=1 << 26)
    calls: dict[str, tuple[nn.ModuleList, Callable[..., Tensor]]] = {
        "plain": (models["plain"], lambda block, x: block(x)),
        "checkpoint": (models["plain"], partial(checkpoint, use_reentrant=False)),
        "offload": (models["offload"], lambda block, x: block(x)),
    }
    x = torch.randn(2, 8, requires_grad=True)
    seconds: dict[str, list[float]] = {way: [] for way in calls}
    for _ in range(rounds):
        for way, (blocks, call) in calls.items():
            started = time.process_time()
            y = x
            for block in blocks:
                y = call(block, y)
            y.sum().backward()
            seconds[way].append((time.process_time() - started) / regions)
    return {way: statistics.median(values[rounds // 10 :]) for way, values in seconds.items()}


def on_cpu(rounds: int) -> None:
    """Prints the cost per region."""
    measured = bookkeeping(regions=32, rounds=rounds)
    plain_s = measured["plain"]
    ratio = (measured["offload"] - plain_s) / (measured["checkpoint"] - plain_s)
    times = ", ".join(f"{way} {1e6 * seconds:.0f} us" for way, seconds in measured.items())
    say(f"a region: {times}\n")
    theirs = 1e6 * (measured["checkpoint"] - plain_s)
    ours = 1e6 * (measured["offload"] - plain_s)
    tell(Row("offloading, what a region adds", ours, "us", "torch's checkpoint", theirs))
    say(f"without its computation, offload takes {ratio:.2f} x what checkpoint takes\n")


class Blocks(nn.Module):
    """The blocks of the default task's model, and how each is called."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        from launch.tasks.byte_lm import Block, ByteLMArgs

        super().__init__()
        args = ByteLMArgs(dim=width, layers=layers, heads=heads)
        with torch.device(DEVICE):
            self.blocks = nn.ModuleList(Block(args).to(torch.bfloat16) for _ in range(layers))
        self.width, self.head_size = width, width // heads
        self.call: Callable[..., Tensor] = lambda block, *inputs: block(*inputs)

    def forward(self, x: Tensor) -> Tensor:
        from launch.tasks.byte_lm import rotation

        angles = rotation(x.shape[1], self.head_size, x.device)
        for block in self.blocks:
            x = self.call(block, x, *angles)
        return x


@contextmanager
def called_by(model: Blocks, call: Callable[..., Any]) -> Iterator[None]:
    """How the blocks are called within the context; also if a step does not fit."""
    original, model.call = model.call, call
    try:
        yield
    finally:
        model.call = original


@contextmanager
def plain(model: Blocks) -> Iterator[AbstractContextManager[Any]]:
    """Everything that autograd saves stays on the device."""
    yield nullcontext()


@contextmanager
def checkpointed(model: Blocks) -> Iterator[AbstractContextManager[Any]]:
    """torch's checkpointing."""
    with called_by(model, partial(checkpoint, use_reentrant=False)):
        yield nullcontext()


@contextmanager
def on_host(model: Blocks) -> Iterator[AbstractContextManager[Any]]:
    """torch's checkpointing within torch's save_on_cpu."""
    with checkpointed(model):
        yield save_on_cpu(pin_memory=True)


@contextmanager
def deepspeed_offload(model: Blocks) -> Iterator[AbstractContextManager[Any]]:
    """torch's checkpointing within DeepSpeed's CheckpointHiddenStatesOffload."""
    from deepspeed.runtime.activation_checkpointing.offload_activations import (
        CheckpointHiddenStatesOffload,
    )

    context = CheckpointHiddenStatesOffload()

    def call(block: nn.Module, x: Tensor, *angles: Tensor) -> Any:
        context.mark(x)  # as it does itself in blocks of transformers
        return checkpoint(block, x, *angles, use_reentrant=False)

    with called_by(model, call):
        yield context


@contextmanager
def offloaded(
    model: Blocks, settings: dict[str, Any], stats: Callable[[offload.OffloadStats], None]
) -> Iterator[AbstractContextManager[Any]]:
    """This package."""
    plan = offload.attach(model, fraction="all", **settings)
    try:
        yield nullcontext()
        torch.cuda.synchronize()
        stats(plan.stats())
    finally:
        plan.detach()


def step(model: Blocks, context: AbstractContextManager[Any], length: int) -> float:
    """Seconds of a forward and a backward."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    x = torch.randn(1, length, model.width, device=DEVICE, dtype=torch.bfloat16)
    with context:
        model(x).square().mean().backward()
    model.zero_grad()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def fits(model: Blocks, way: Callable[..., Any], length: int) -> bool:
    """Whether a step of that length has room."""
    try:
        with way(model) as context:
            step(model, context, length)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def longest(model: Blocks, way: Callable[..., Any], most: int, grain: int = 4096) -> int:
    """The longest sequence that fits, in steps of `grain`, up to `most`."""
    low, high = 0, most // grain
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(model, way, middle * grain) else (low, middle - 1)
    return low * grain


def on_gpu(name: str, lengths: list[int], rounds: int, most: int) -> None:
    """Prints a line for every way and length."""
    width, layers, heads = SHAPES[name]
    model = Blocks(width, layers, heads)
    collected: list[offload.OffloadStats] = []
    ways: dict[str, Callable[..., Any]] = {
        "plain": plain,
        "checkpoint": checkpointed,
        "save_on_cpu": on_host,
        "deepspeed": deepspeed_offload,
        "offload": partial(offloaded, settings={"mode": "inputs"}, stats=collected.append),
        "offload saved": partial(offloaded, settings={"mode": "saved"}, stats=collected.append),
    }
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {name}, {layers} blocks\n")
    for length in lengths:
        fitting = {way: make for way, make in ways.items() if fits(model, make, length)}
        seconds: dict[str, list[float]] = {way: [] for way in fitting}
        peaks, stalls = dict.fromkeys(fitting, 0), dict.fromkeys(fitting, 0.0)
        for _ in range(rounds):
            for way, make in fitting.items():
                collected.clear()
                torch.cuda.reset_peak_memory_stats()
                with make(model) as context:
                    step(model, context, length)  # pins what it needs
                    seconds[way] += [step(model, context, length) for _ in range(3)]
                peaks[way] = torch.cuda.max_memory_allocated()
                if collected:
                    stalls[way] = collected[0].stall_s / 4
        base = statistics.median(seconds["checkpoint"]) if "checkpoint" in fitting else None
        for way in ways:
            if way not in fitting:
                say(f"{length} {way}: does not fit\n")
                continue
            time_s = statistics.median(seconds[way])
            ratio = f" ({time_s / base:.3f} x checkpoint)" if base else ""
            say(
                f"{length} {way}: peak {peaks[way] / 1e9:.2f} GB, {1e3 * time_s:.1f} ms{ratio}, "
                f"waits {stalls[way] / time_s:.2%}\n"
            )
    for way, make in ways.items() if most else ():
        say(f"longest sequence, {way}: {longest(model, make, most)}\n")


def main() -> None:
    """Measures what this machine can."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SHAPES, default="1b")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--rounds", type=int, help="default: 5 on a GPU, 300 on a CPU")
    parser.add_argument("--longest", type=int, default=1 << 20, help="where to stop looking")
    args = parser.parse_args()
    if torch.cuda.is_available():
        on_gpu(args.model, args.lengths, args.rounds or 5, args.longest)
    else:
        on_cpu(args.rounds or 300)


if __name__ == "__main__":
    main()
