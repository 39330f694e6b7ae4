"""What reads or changes weights where they are empty, at stage 3, is refused by name before the
first step; with `unused_parameters = "zeros"` it reads them."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.errors import TaskError
from harness.testing.pool import RankPool
from tests.support.small_loop import BATCHES, SGD, engines_of, train, weights_of


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.follower = nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x) * self.scale))


def norm(engine: Any, batch: Tensor) -> Tensor:
    """Without a graph, so that torch would not notice."""
    with torch.no_grad():
        size = sum(p.square().sum() for p in engine.module.parameters())
    return engine(batch).square().mean() * (1 + size)


def penalty(engine: Any, batch: Tensor) -> Tensor:
    loss = engine(batch).square().mean()
    return loss + 0.01 * sum(p.abs().sum() for p in engine.module.parameters())


def detached(engine: Any, batch: Tensor) -> Tensor:
    return (engine(batch) * engine.module.scale.detach().sum()).square().mean()


def listed(engine: Any, batch: Tensor) -> Tensor:
    weights = [p.data for p in (engine.module.first.weight, engine.module.last.weight)]
    return engine(batch).square().mean() * (1 + torch.stack(weights).square().sum())


def called_by_vmap(engine: Any, batch: Tensor) -> Tensor:
    return torch.vmap(engine.module.first)(batch).square().mean() + engine(batch).square().mean()


def follow(engine: Any, batch: Tensor) -> Tensor:
    net = engine.module
    with torch.no_grad():
        for own, other in zip(net.follower.parameters(), net.first.parameters(), strict=True):
            own.data = own.data * 0.9 + other.data * 0.1
    return engine(batch).square().mean()


Compute = Callable[[Any, Tensor], Tensor]
READS: dict[Compute, str] = {
    norm: "square was called with parameter 'scale' outside of the module that has it",
    penalty: "abs was called with parameter 'scale' outside of the module that has it",
    detached: "sum was called with parameter 'scale' outside of the module that has it",
    listed: "stack was called with parameter 'first.weight' outside of the module that has it",
    called_by_vmap: "Linear was called inside of a function of torch.func",
}


def described(engine: Any, batch: Tensor) -> Tensor:
    """What needs no values."""
    module = engine.module
    count = sum(p.numel() for p in module.parameters())
    assert all(p.requires_grad for p in module.first.parameters()), count
    module.last.requires_grad_(True)
    parameter = next(module.parameters())
    assert parameter.data.dtype == torch.float32 and repr(module) and hash(parameter)
    return engine(batch.to(parameter.device, parameter.dtype)).square().mean()


def converted(engine: Any, batch: Tensor) -> Tensor:
    """To what it is already, as the routers of mixtures of experts do with their own layer."""
    engine.module.first = engine.module.first.to(torch.float32)
    weight = engine.module.first.weight
    assert weight.to(batch.device).contiguous().type(weight.dtype) is weight and weight.type()
    return engine(batch.to(weight).type_as(weight)).square().mean()


def halved(engine: Any, batch: Tensor) -> Tensor:
    return engine(batch).square().mean() + engine.module.first.weight.type(torch.bfloat16).sum()


REFUSED = READS | {
    follow: "mul was called with parameter 'follower.weight' outside of the module",
    halved: "type was called with parameter 'first.weight' outside of the module that has it",
}


def gathered(engine: Any, batch: Tensor) -> Tensor:
    """As docs/engines.md says for weights of another engine."""
    weights = list(engine.module.parameters())
    complete: Any = nullcontext()
    if hasattr(weights[0], "ds_id"):
        import deepspeed  # late: zero.startup patches it first

        complete = deepspeed.zero.GatheredParameters(weights)
    with torch.no_grad(), complete:
        size = sum(p.square().sum() for p in weights)
    return engine(batch).square().mean() * (1 + size)


def outcome(compute: Compute, unused: str) -> dict[str, Tensor] | str:
    """The weights after all steps, or an error and whether a step was taken."""
    feed = Feed(compute)
    settings = {"optimizer": SGD, "unused_parameters": unused}
    engines = engines_of(Net(), feed, 3, **settings)
    try:
        train(engines, BATCHES)
        return weights_of(engines)
    except TaskError as error:
        assert not engines["net"].counters.micro_step
        return str(error)
    finally:
        engines.close()


class Feed:
    """As a feeder."""

    def __init__(self, compute: Compute):
        self._compute = compute

    def __call__(self, engine: Any, batch: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return self._compute(engine, batch), {}


class Plain:
    """In place of an engine."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, batch: Tensor) -> Tensor:
        return self.module(batch)


def trained_by_torch(compute: Compute) -> dict[str, Tensor]:
    """In one process, without DeepSpeed."""
    net = Net()
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
    for batch in BATCHES:
        optimizer.zero_grad()
        for part in batch.chunk(2):
            (compute(Plain(net), part) / 2).backward()
        optimizer.step()
    return net.state_dict()


@pytest.mark.parametrize("compute", REFUSED, ids=lambda compute: compute.__name__)
def test_reading_an_empty_weight_is_refused_by_name(two_ranks: RankPool, compute: Compute) -> None:
    for error in two_ranks.run(outcome, compute, "error"):
        assert REFUSED[compute] in error
        assert 'unused_parameters = "zeros"' in error


@pytest.mark.parametrize(
    ("compute", "unused"),
    [
        *((compute, "zeros") for compute in READS),
        (described, "error"),
        (converted, "error"),
        (gathered, "error"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_what_is_there_can_be_read(two_ranks: RankPool, compute: Compute, unused: str) -> None:
    expected = trained_by_torch(compute)
    for found in two_ranks.run(outcome, compute, unused):
        for path, weight in expected.items():
            torch.testing.assert_close(found[path], weight, rtol=1e-5, atol=1e-6, msg=path)


def fails(engine: Any, batch: Tensor) -> Tensor:
    return engine.module.last(batch[:, :3]).square().mean()


def error_and_next() -> tuple[str, dict[str, Tensor] | str]:
    """The error of a module that had its weights, and what a training comes to after it."""
    engines = engines_of(Net(), Feed(fails), 3, optimizer=SGD, unused_parameters="zeros")
    with pytest.raises(RuntimeError) as caught:
        train(engines, BATCHES)
    engines.close()
    return str(caught.value), outcome(described, "zeros")


def test_an_error_in_a_gathered_module_stays_the_error(two_ranks: RankPool) -> None:
    for error, found in two_ranks.run(error_and_next):
        assert "mat1 and mat2 shapes cannot be multiplied" in error
        assert isinstance(found, dict)
