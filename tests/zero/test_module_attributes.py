"""At stage 3 weights are there in the backward of whatever forward leaves behind."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.task import default_feeder
from harness.testing.pool import RankPool
from tests.support.small_loop import SGD, engines_of, train, weights_of


class Body(nn.Module):
    """Weights of its own beside those of its children, and one of a child's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 4)
        self.place = nn.Parameter(torch.randn(3, 4))
        self.scale = nn.Parameter(torch.ones(1))
        self.layer = nn.Linear(4, 4)

    def scores(self, x: Tensor) -> Tensor:
        hidden = self.layer(self.embed(x) + self.place) * self.scale
        return F.linear(hidden, self.embed.weight)

    def loss_of(self, x: Tensor) -> Tensor:
        return F.cross_entropy(self.scores(x).flatten(0, 1), x.flatten())


class Attribute(Body):
    def forward(self, x: Tensor) -> Tensor:
        self.loss = self.loss_of(x)
        return x.float()


class Object(Body):
    """Its output is an object of a kind that DeepSpeed does not know."""

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=self.loss_of(x), number=3)


class Inner(nn.Module):
    """A submodule has the loss, and its output is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Attribute()

    def forward(self, x: Tensor) -> None:
        self.body(x)


class Features(Body):
    """What a feeder computes the loss from."""

    kind: type[Any]

    def forward(self, x: Tensor) -> None:
        scores = self.scores(x)
        self.features = {
            list: lambda: [scores, scores.square()],
            tuple: lambda: (scores, scores.square()),
            dict: lambda: {"plain": scores, "squared": scores.square()},
        }[self.kind]()


class List(Features):
    kind = list


class Tuple(Features):
    kind = tuple


class Dict(Features):
    kind = dict


def feed_features(engine: Any, batch: Tensor) -> tuple[Tensor, dict[str, Any]]:
    engine(batch)
    found = engine.module.features
    one, other = found.values() if isinstance(found, dict) else found
    return F.cross_entropy((one + 0.1 * other).flatten(0, 1), batch.flatten()), {}


class Watched(Body):
    """What is left is the tensor of the graph, whose gradient may be asked for."""

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.layer(self.embed(x) + self.place)
        self.hidden.retain_grad()
        return F.linear(self.hidden * self.scale, self.embed.weight)


def feed_watched(engine: Any, batch: Tensor) -> tuple[Tensor, dict[str, Any]]:
    scores, hidden = engine(batch), engine.module.hidden
    (slope,) = torch.autograd.grad(scores.square().sum(), hidden, create_graph=True)
    loss = F.cross_entropy(scores.flatten(0, 1), batch.flatten())
    return loss + 1e-4 * slope.square().mean(), {}  # as of a gradient penalty


MODELS: dict[type[nn.Module], Any] = {
    Attribute: default_feeder,
    Object: default_feeder,
    Inner: default_feeder,
    List: feed_features,
    Tuple: feed_features,
    Dict: feed_features,
    Watched: feed_watched,
}
BATCHES = [
    torch.arange(12).view(4, 3) % 7,
    torch.arange(5, 17).view(4, 3) % 5,
    torch.ones(4, 3).long(),
]


def trained(kind: type[nn.Module], stage: int) -> dict[str, Tensor]:
    engines = engines_of(kind(), MODELS[kind], stage, optimizer=SGD)
    train(engines, BATCHES)
    if kind is Watched:
        hidden: Any = engines["net"].module.hidden
        assert hidden.grad.count_nonzero()
    found = weights_of(engines)
    engines.close()
    return found


def trained_by_torch(kind: type[nn.Module]) -> dict[str, Tensor]:
    """In one process, without DeepSpeed."""
    model = kind()

    class Plain:
        module = model

        def __call__(self, batch: Tensor) -> Tensor:
            return model(batch)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for batch in BATCHES:
        optimizer.zero_grad()
        if MODELS[kind] is not default_feeder:
            loss, _ = MODELS[kind](Plain(), batch)
        else:
            output = model(batch)
            loss = next(m.loss for m in [output, *model.modules()] if hasattr(m, "loss"))
        loss.backward()
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_what_forward_leaves_in_an_attribute(two_ranks: RankPool, kind: type[nn.Module]) -> None:
    expected = trained_by_torch(kind)
    for found in two_ranks.run(trained, kind, 3):
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6, msg=name)
