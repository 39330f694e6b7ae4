"""Several engines: losses of one model that go through another."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.utils import to_device
from tests.zoo.data import classes, vectors
from tests.zoo.entry import entry

Fed = tuple[Tensor, dict[str, Any]]


def perceptron(inputs: int, width: int, outputs: int) -> nn.Module:
    """Two layers."""
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs))


def feed_gan(engine: Any, batch: Any) -> Fed:
    """The discriminator learns from real and made samples, then the generator from it."""
    noise, real = to_device(batch, engine.device, engine.dtype)
    if engine.name == "D":
        with torch.no_grad(), engine.peers.lend("G") as generator:
            made = generator(noise)
        right, wrong = engine(torch.cat([real, made])).float().chunk(2)
        return (F.softplus(-right) + F.softplus(wrong)).mean(), {}
    made = engine(noise)
    with engine.peers.lend("D") as discriminator:
        return F.softplus(-discriminator(made).float()).mean(), {}


@entry(vectors, feeder=feed_gan, autocast=False)
def gan() -> dict[str, nn.Module]:
    return {"D": perceptron(8, 16, 1), "G": perceptron(8, 16, 8)}


@entry(vectors, feeder=feed_gan, engines={"G": {"train_every": 2, "ema_decay": 0.7}})
def gan_with_a_slow_averaged_generator() -> dict[str, nn.Module]:
    return {"D": perceptron(8, 16, 1), "G": perceptron(8, 16, 8)}


def feed_wgan(engine: Any, batch: Any) -> Fed:
    """A critic with a penalty on the norm of its gradient (Gulrajani et al. 2017)."""
    noise, real = to_device(batch, engine.device, engine.dtype)
    if engine.name == "G":
        made = engine(noise)
        with engine.peers.lend("critic") as critic:
            return -critic(made).float().mean(), {}
    with torch.no_grad(), engine.peers.lend("G") as generator:
        made = generator(noise)
    critic = engine.module
    between = (0.3 * real + 0.7 * made).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    penalty = (slope.float().norm(dim=1) - 1).square().mean()
    return critic(made).float().mean() - critic(real).float().mean() + 10 * penalty, {}


@entry(
    vectors,
    feeder=feed_wgan,
    engines={"G": {"train_every": 2}},
)
def wgan_with_gradient_penalty() -> dict[str, nn.Module]:
    return {"critic": perceptron(8, 16, 1), "G": perceptron(8, 16, 8)}


def feed_distillation(engine: Any, batch: Any) -> Fed:
    """The student learns from the classes and from a frozen teacher."""
    x, kind = to_device(batch, engine.device, engine.dtype)
    with torch.no_grad(), engine.peers.lend("teacher") as teacher:
        target = teacher(x).float().softmax(1)
    logits = engine(x).float()
    return F.cross_entropy(logits, kind) + F.kl_div(logits.log_softmax(1), target), {}


@entry(classes, feeder=feed_distillation, engines={"teacher": {"role": "teacher"}})
def distillation() -> dict[str, nn.Module]:
    return {"student": perceptron(8, 6, 8), "teacher": perceptron(8, 32, 8)}


def feed_perceptual(engine: Any, batch: Any) -> Fed:
    """The loss is measured by the features of a frozen network: gradients go through it."""
    x, y = to_device(batch, engine.device, engine.dtype)
    made = engine(x)
    with engine.peers.lend("judge") as judge:
        return F.mse_loss(judge(made).float(), judge(y).float()), {}


@entry(vectors, feeder=feed_perceptual, engines={"judge": {"role": "teacher"}})
def perceptual_loss() -> dict[str, nn.Module]:
    return {"net": perceptron(8, 16, 8), "judge": perceptron(8, 16, 4)}


def feed_module(engine: Any, batch: Any) -> Fed:
    """Calls the bare model in the engine's own turn: parts of a model, or its gradient."""
    x, y = to_device(batch, engine.device, engine.dtype)
    first, *others = engine.module
    hidden = first(x)
    for layer in others:
        hidden = layer(hidden)
    return F.mse_loss(hidden.float(), y.float()), {}


@entry(vectors, feeder=feed_module)
def called_by_its_parts() -> nn.Module:
    return perceptron(8, 16, 8)
