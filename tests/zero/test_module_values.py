"""Modules take, return, change and leave behind what they like: plain PyTorch's training, at
stage 3 too."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from harness.testing.pool import RankPool
from tests.support.quick import quick
from tests.support.small_loop import SGD, engines_of, train, weights_of

STEPS = 4
MODELS: dict[str, type["Model"]] = {}


class Block(nn.Module):
    """A weight of its own beside those of its child."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.gain = nn.Parameter(torch.full((8,), 1.2))

    def compute(self, x: Tensor) -> Tensor:
        """What every kind computes."""
        return torch.tanh(self.layer(x) * self.gain)


class Plain(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x)


class Model(nn.Module):
    """Two blocks of a kind between two layers."""

    kind: type[nn.Module] = Plain

    def __init_subclass__(cls) -> None:
        MODELS[cls.__name__] = cls

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.blocks: Any = nn.ModuleList(type(self).kind() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return F.mse_loss(self.last(self.middle(self.first(x))), x.sin())

    def middle(self, x: Tensor) -> Tensor:
        """Between the layers."""
        for block in self.blocks:
            x = self.output_of(block(x))
        return x

    def output_of(self, found: Any) -> Tensor:
        """The tensor in what a block returns."""
        return found


class ReturnsANumber(Model):
    class kind(Block):
        def forward(self, x: Tensor) -> int:
            self.kept = self.compute(x)
            return 3

    def middle(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            assert block(x) == 3
            x = block.kept
        return x


class ReturnsASet(Model):
    class kind(Block):
        def forward(self, x: Tensor) -> set[str]:
            self.kept = self.compute(x)
            return {"a"}

    def middle(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            assert block(x) == {"a"}
            x = block.kept
        return x


@dataclass(frozen=True, slots=True)
class Slots:
    hidden: Tensor
    number: int = 3


class ReturnsSlots(Model):
    class kind(Block):
        def forward(self, x: Tensor) -> Slots:
            return Slots(self.compute(x) * self.gain)

    def output_of(self, found: Slots) -> Tensor:
        return found.hidden


class ReturnsNestedRecords(Model):
    class kind(Block):
        def forward(self, x: Tensor) -> dict[str, Any]:
            hidden = self.compute(x) * self.gain
            return {"a": [None, (Slots(hidden), SimpleNamespace(other=hidden / 2))]}

    def output_of(self, found: dict[str, Any]) -> Tensor:
        slots, namespace = found["a"][1]
        return slots.hidden + namespace.other


class Boxes(list[Tensor]):
    def __init__(self, boxes: list[Tensor], size: int):
        super().__init__(boxes)
        self.size = size


class ReturnsAListOfItsOwnClass(Model):
    class kind(Block):
        def forward(self, x: Tensor) -> Boxes:
            return Boxes([self.compute(x) * self.gain], size=3)

    def output_of(self, found: Boxes) -> Tensor:
        assert found.size == 3
        return found[0]


class ReturnsAnIterator(Model):
    class kind(Block):
        def forward(self, x: Tensor) -> Iterator[Tensor]:
            yield torch.tanh(self.layer(x) * self.gain)

    def output_of(self, found: Iterator[Tensor]) -> Tensor:
        return next(found)


class KeepsSkipsInAList(Model):
    """As a U-Net does: blocks on the way down append, those on the way up pop."""

    class kind(Block):
        def forward(self, x: Tensor, skips: list[Tensor], down: bool) -> Tensor:
            x = self.compute(x if down else x + skips.pop())
            if down:
                skips.append(x)
            return x

    def middle(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for down in (True, False):
            for block in self.blocks:
                x = block(x, skips, down)
        assert not skips
        return x


class WritesIntoADict(Model):
    class kind(Block):
        def forward(self, state: dict[str, Tensor]) -> None:
            state["hidden"] = self.compute(state["hidden"]) * self.gain

    def middle(self, x: Tensor) -> Tensor:
        state = {"hidden": x}
        for block in self.blocks:
            block(state)
        return state["hidden"]


class WritesIntoAKeyword(Model):
    class kind(Block):
        def forward(self, *, state: Any) -> None:
            state.hidden = self.compute(state.hidden) * self.gain

    def middle(self, x: Tensor) -> Tensor:
        class State:
            hidden = x

        state = State()
        for block in self.blocks:
            block(state=state)
        return state.hidden


class ChangesItsArgument(Model):
    class kind(Block):
        def forward(self, x: Tensor) -> None:
            x += self.compute(x.clone())

    def middle(self, x: Tensor) -> Tensor:
        x = x * 1
        for block in self.blocks:
            block(x)
        return x


class FillsItsArgument(Model):
    class kind(Block):
        def forward(self, x: Tensor, out: Tensor) -> None:
            out[:, :4] = self.compute(x)[:, :4]

    def middle(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            out = torch.zeros_like(x)
            block(x, out)
            x = out
        return x


class IsHooked(Model):
    """A hook of the user's keeps an output; nothing else is used."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Any] = {}
        keep = self.kept.__setitem__
        self.blocks[1].register_forward_hook(lambda _, __, output: keep("features", output))

    def middle(self, x: Tensor) -> Tensor:
        super().middle(x)
        return self.kept["features"]


class HasHooksOnItsBackward(Model):
    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.register_full_backward_hook(lambda _, slopes, __: (slopes[0] / 2,))
            block.register_full_backward_pre_hook(lambda _, slopes: (slopes[0] * 3,))


class IsCheckpointedWithAStatistic(Model):
    """The last tensor that it saves for its backward has no part in the loss, so that the layer is
    called again in its own backward."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.head_and_statistic, self.first(x), use_reentrant=False)
        return F.mse_loss(hidden, x.sin())

    def head_and_statistic(self, x: Tensor) -> Tensor:
        x = self.head(self.middle(x))
        self.statistic = x.square().mean()
        return x


class IsCalledAsAFunction(Model):
    """One step of gradient descent inside of the forward."""

    def middle(self, x: Tensor) -> Tensor:
        weights = {"weight": self.last.weight, "bias": self.last.bias}
        call = torch.func.functional_call
        loss = call(self.last, weights, (x,)).square().mean()
        slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        moved = {n: w - 0.1 * d for (n, w), d in zip(weights.items(), slopes, strict=True)}
        return call(self.last, moved, (x,))


class ReturnsWhatContainsItself(Model):
    class kind(Block):
        def forward(self, x: Tensor) -> Any:
            node = SimpleNamespace(hidden=self.compute(x) * self.gain, others=[])
            node.others.append({"parent": node})
            self.tree = node
            return node

    def output_of(self, found: Any) -> Tensor:
        return found.others[0]["parent"].hidden


class LeavesRecordsInAttributes(Model):
    class kind(Block):
        def forward(self, x: Tensor) -> None:
            hidden = self.compute(x) * self.gain
            self.left = SimpleNamespace(hidden=hidden / 2)
            self.listed = [None, {"hidden": hidden / 2}]

    def middle(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            block(x)
            x = block.left.hidden + block.listed[1]["hidden"]
        return x


def micro_batches(number: int) -> list[Tensor]:
    """Of both ranks, [4, 8] each."""
    return list(torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(number)))


def feed(engine: Any, batch: Tensor) -> tuple[Tensor, dict[str, Any]]:
    return engine(batch), {}


def trained(name: str, stage: int, accumulation: int) -> dict[str, Tensor]:
    ds = {"gradient_accumulation_steps": accumulation}
    engines = engines_of(MODELS[name](), feed, stage, ds, optimizer=SGD)
    for step in range(STEPS):
        numbers = range(step * accumulation, (step + 1) * accumulation)
        train(engines, [torch.cat(micro_batches(number)) for number in numbers])
    found = weights_of(engines)
    engines.close()
    return found


def trained_by_torch(name: str, accumulation: int) -> dict[str, Tensor]:
    """In one process, without DeepSpeed."""
    model = MODELS[name]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        for number in range(step * accumulation, (step + 1) * accumulation):
            for batch in micro_batches(number):
                (model(batch) / (2 * accumulation)).backward()
        optimizer.step()
    return model.state_dict()


CASES = [(name, stage, count) for name in MODELS for stage in range(4) for count in (1, 2)]


@pytest.mark.parametrize(
    ("name", "stage", "accumulation"),
    quick(CASES, *((name, 3, 1 + index % 2) for index, name in enumerate(MODELS))),
)
def test_what_passes_between_modules(
    two_ranks: RankPool, name: str, stage: int, accumulation: int
) -> None:
    expected = trained_by_torch(name, accumulation)
    for found in two_ranks.run(trained, name, stage, accumulation):
        assert found.keys() == expected.keys()
        for path, weight in expected.items():
            torch.testing.assert_close(found[path], weight, rtol=1e-5, atol=1e-6, msg=path)
