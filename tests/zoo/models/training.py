"""One small model trained in ways other than AdamW on all of its weights."""

from typing import Any

import torch
from torch import Tensor, nn

from harness.utils import to_device
from tests.zoo.data import vectors
from tests.zoo.entry import ADAMW, call, entry
from tests.zoo.models.basics import Mlp, mse


@entry(vectors, engines={"net": {"ema_decay": 0.8}}, autocast=True)
class ExponentialMovingAverage(Mlp):
    pass


@entry(vectors, engines={"net": {"frozen": ["first"]}})
class FrozenPart(Mlp):
    pass


@entry(vectors, engines={"net": {"lora": {"targets": "first|last", "rank": 2, "alpha": 4}}})
class Lora(Mlp):
    """Needs the extra: lora."""


@entry(vectors, optimizer={"name": "torch.optim:SGD", "lr": 0.3, "momentum": 0.9})
class SgdWithMomentum(Mlp):
    pass


@entry(vectors, optimizer={"name": "torch.optim:Adagrad", "lr": 0.03, "eps": 1e-5})
class Adagrad(Mlp):
    pass


@entry(vectors, optimizer={"name": "torch.optim:RMSprop", "lr": 0.003, "eps": 1e-4})
class RmsProp(Mlp):
    pass


@entry(vectors, optimizer={"name": "torch.optim:NAdam", "lr": 0.01, "eps": 1e-5})
class NAdam(Mlp):
    pass


GROUPS = [
    {"name": "biases", "match": ".*bias", "weight_decay": 0.0},
    {"name": "last", "match": "last", "lr": 3e-3},
]


@entry(vectors, optimizer=ADAMW | {"groups": GROUPS})
class ParameterGroups(Mlp):
    pass


def edit_and_feed(engine: Any, batch: Any) -> tuple[Tensor, dict[str, Any]]:
    """Clamps the weights before every step, as the first WGAN did."""
    if engine.counters.micro_step % engine.gradient_accumulation == 0:
        with engine.edit_weights() as model, torch.no_grad():
            for parameter in model.parameters():
                parameter.clamp_(-0.2, 0.2)
    return call(engine, batch)


@entry(vectors, feeder=edit_and_feed)
class EditedWeights(Mlp):
    pass


def feed_penalty(engine: Any, batch: Any) -> tuple[Tensor, dict[str, Any]]:
    """A smoothness penalty: the gradient of the output with respect to the input."""
    x, y = to_device(batch, engine.device, engine.dtype)
    x = x.requires_grad_()
    output = engine(x)
    (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    return mse(output, y) + slope.float().square().mean(), {}


@entry(vectors, feeder=feed_penalty)
def gradient_penalty() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
