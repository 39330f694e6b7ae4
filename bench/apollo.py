"""The cost of an APOLLO step, compared with torch's AdamW and the authors' `apollo_torch`.

    python -m bench.apollo [--apollo-torch DIRECTORY] [--steps 20]

Time: all step the same matrices with the same gradients, interleaved in one process; medians.
Bytes: the optimizer state of one process; and under ZeRO on 2 gloo ranks the state of a rank and
what it passes to collectives in a step. DIRECTORY contains `apollo_torch`, if it is not installed:
`pip install --no-deps --target DIRECTORY apollo-torch`. On a GPU: `python -m bench.gpu apollo`.
"""

import argparse
import importlib
import importlib.util
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bench.rows import Row, tell
from harness.optim import Apollo, ApolloMini
from harness.testing.pool import RankPool

Makers = dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]

# (rows, columns), how many, rank
SIZES = [
    ((256, 256), 24, 64),
    ((512, 2048), 8, 64),
    ((1024, 4096), 4, 64),
    ((4096, 1024), 4, 64),
    ((1024, 4096), 4, 256),
    ((2048, 2048), 4, 512),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--apollo-torch", default="")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    if options.apollo_torch:
        sys.path.append(options.apollo_torch)
    official = the_authors_own() if importlib.util.find_spec("apollo_torch") else None
    say(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    say(f"\n{'matrices':>22} {'optimizer':>16} {'ms/step':>9} {'/ AdamW':>8} {'state':>9}")
    for shape, count, rank in SIZES:
        times, state = in_turn(shape, count, optimizers(rank, official), options.steps)
        what = f"{count} x {shape[0]} x {shape[1]}, r {rank}"
        for name, seconds in times.items():
            ratio = seconds / times["adamw foreach"]
            say(f"{what:>22} {name:>16} {seconds * 1e3:9.2f} {ratio:8.2f} {megabytes(state[name])}")
        for other in times.keys() - {"apollo", "apollo-mini", "apollo_torch mini"}:
            ours, theirs = times["apollo"] * 1e3, times[other] * 1e3
            tell(Row(f"a step of APOLLO, {what}", ours, "ms", other, theirs))
        adamw = state["adamw foreach"] / 1e6
        tell(Row(f"state of APOLLO, {what}", state["apollo"] / 1e6, "MB", "AdamW", adamw))
    say(f"\n{'ZeRO on 2 ranks':>22} {'optimizer':>16} {'state':>9} {'sent':>9} {'of grads':>9}")
    with RankPool(2) as pool:
        for stage in (1, 2, 3):
            for mini in (False, True):
                state, sent, gradients = pool.run(bytes_under_zero, stage, mini)[0]
                name = "apollo-mini" if mini else "apollo r 64"
                figures = f"{megabytes(state)} {megabytes(sent)} {sent / gradients:9.2%}"
                say(f"{f'stage {stage}':>22} {name:>16} {figures}")


def in_turn(
    shape: tuple[int, int], count: int, makers: Makers, steps: int
) -> tuple[dict[str, float], dict[str, int]]:
    """Median seconds of a step, and bytes of state, by optimizer."""
    gradients = [torch.randn(shape) for _ in range(count)]
    made = {
        name: make([nn.Parameter(torch.randn(shape)) for _ in gradients])
        for name, make in makers.items()
    }
    taken: dict[str, list[float]] = {name: [] for name in made}
    for step in range(steps + 2):
        for name, optimizer in made.items():
            parameters = optimizer.param_groups[0]["params"]
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            started = time.perf_counter()
            optimizer.step()
            if step > 1:  # the first ones allocate
                taken[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(seconds) for name, seconds in taken.items()}
    return medians, {name: state_bytes(optimizer) for name, optimizer in made.items()}


def optimizers(rank: int, official: Any) -> Makers:
    """Each optimizer's constructor, by name. `official`: the authors' class, if installed."""
    makers: Makers = {
        "adamw foreach": lambda p: torch.optim.AdamW(p, foreach=True),
        "adamw fused": lambda p: torch.optim.AdamW(p, fused=True),
        "apollo": lambda p: Apollo(p, rank=rank),
        "apollo-mini": lambda p: ApolloMini(p),
    }
    if official is not None:
        settings: dict[str, Any] = {"proj": "random", "update_proj_gap": 200, "proj_type": "std"}
        channel = settings | {"rank": rank, "scale": 1, "scale_type": "channel"}
        tensor = settings | {"rank": 1, "scale": 128, "scale_type": "tensor"}
        makers["apollo_torch"] = lambda p: official([{"params": p, **channel}])
        makers["apollo_torch mini"] = lambda p: official([{"params": p, **tensor}])
    return makers


def the_authors_own() -> Any:
    """Their optimizer, without the imports of transformers and bitsandbytes around it."""
    spec = importlib.util.find_spec("apollo_torch")
    assert spec is not None
    package: Any = types.ModuleType("apollo_torch")
    package.__path__ = spec.submodule_search_locations
    versions: Any = types.ModuleType("transformers.utils.versions")
    versions.require_version = lambda *_: None
    names = ("transformers", "transformers.utils")
    stubs = {name: types.ModuleType(name) for name in names}
    sys.modules |= stubs | {"apollo_torch": package, "transformers.utils.versions": versions}
    return importlib.import_module("apollo_torch.apollo").AdamW


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the state, and in objects that hold tensors."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    held = [inner for value in values for inner in getattr(value, "__dict__", {}).values()]
    return sum(tensor.nbytes for tensor in tensors([*values, *held]))


def tensors(values: Iterable[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]


class Wide(nn.Module):
    """Five matrices, up and down in turn, so that shards end inside of some."""

    def __init__(self) -> None:
        super().__init__()
        shapes = [(512, 1376), (1376, 512)] * 2 + [(512, 1376)]
        self.layers = nn.ModuleList(nn.Linear(*shape, bias=False) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().sum()


def bytes_under_zero(stage: int, mini: bool) -> tuple[int, int, int]:
    """Bytes of a rank's state, of what it passes to collectives in an optimizer step, and of the
    full model's gradients in bf16."""
    import deepspeed

    model = Wide()
    optimizer = ApolloMini(model.parameters()) if mini else Apollo(model.parameters(), rank=64)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    engine: Any = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    sent = [0]
    plain = optimizer.step

    def counting(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(output: Tensor, input: Tensor, **options: Any) -> Any:
            sent[0] += input.nbytes
            return collective(output, input, **options)

        return call

    def step() -> None:
        originals = dist.reduce_scatter_tensor, dist.all_gather_into_tensor
        dist.reduce_scatter_tensor, dist.all_gather_into_tensor = map(counting, originals)
        plain()
        dist.reduce_scatter_tensor, dist.all_gather_into_tensor = originals

    for _ in range(2):
        optimizer.step = step  # type: ignore[method-assign]
        sent[0] = 0
        loss = engine(torch.randn(1, 512))
        engine.backward(loss)
        engine.step()
    engine.destroy()
    return state_bytes(optimizer), sent[0], 2 * 5 * 512 * 1376


def megabytes(count: int) -> str:
    return f"{count / 1e6:6.2f} MB"


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
