"""What no layout trains: the whole list, in the form of entries, each with its error."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.data import tokens, vectors
from tests.zoo.entry import Entry, call
from tests.zoo.models.basics import Mlp, mse


class SparseGradients(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(11, 8, sparse=True), nn.Linear(8, 1)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.words(words)).float().square().mean()


class ComplexParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.phase = nn.Parameter(torch.ones(8, dtype=torch.complex64))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return mse((self.first(x) * self.phase).real, y)


def double_precision() -> nn.Module:
    """A model that was made in float64."""
    return Mlp().double()


class LazyModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LazyLinear(8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return mse(self.layer(x), y)


def feed_twice(engine: Any, batch: Any) -> tuple[Tensor, dict[str, Any]]:
    """Back-propagates one loss, and returns another."""
    engine.backward(call(engine, batch)[0])
    return call(engine, batch)


def _entry(name: str, build: Callable[[], nn.Module] = Mlp, **settings: Any) -> Entry:
    return Entry(name=name, build=build, **{"batch": vectors, **settings})


COMPLETE_GRADIENTS = {"net": {"ds_overrides": {"zero_optimization": {"reduce_scatter": False}}}}
"""What Muon wants at ZeRO 3."""

REFUSED: list[tuple[Entry, str]] = [
    (
        _entry("sparse gradients", SparseGradients, batch=tokens),
        r"'words.weight' \(torch.float32\) would have sparse gradients.* with sparse=False",
    ),
    (
        _entry("complex parameters", ComplexParameters),
        "'phase' is torch.complex64, expected .*torch.view_as_complex",
    ),
    (
        _entry("float64 parameters", double_precision),
        r"'first.weight' is torch.float64, expected .*model.float\(\)",
    ),
    (
        _entry("lazy modules", LazyModule),
        "parameter 'layer.weight' has no shape yet.* call the model once with a batch",
    ),
    (
        _entry("lbfgs", optimizer={"name": "torch.optim:LBFGS", "lr": 0.1}),
        "'torch.optim:LBFGS' is not supported: it computes the loss several times a step",
    ),
    (
        _entry("two backwards in a feeder", feeder=feed_twice),
        "a second backward in one micro-batch.*return the sum of the losses from the feeder",
    ),
    (
        _entry(
            "muon-deepspeed",
            optimizer={"name": "muon-deepspeed", "lr": 1e-2},
            engines=COMPLETE_GRADIENTS,
        ),
        "clips its updates instead of the gradients .to 1.: set gradient_clipping = 0",
    ),
]
"""Each with a pattern of the error. Muon is refused where DeepSpeed steps it on shards."""
