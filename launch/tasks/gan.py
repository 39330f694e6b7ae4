"""A generative adversarial network of handwritten digits: two engines, G and D, in one loop.

Goodfellow et al., "Generative Adversarial Nets", 2014, with the non-saturating loss. The
discriminator D learns to distinguish digits from what the generator G makes of noise; the loss of G
goes through D.

Tensor names end in their shape: B batch, P pixels (64), Z noise, S samples.
"""

from functools import partial
from typing import Any

import digits
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from harness.config import Config, Section
from harness.errors import CommandError
from harness.task import Stats, Task

SAMPLES = 256
"""Digits that an evaluation of G generates, from the same noise each time."""
SHADES = " .:-=+*#%@"
MOST_DRAWN = 12  # side by side


class GanArgs(Section):
    """[task] args = {...} of this task."""

    noise: int = Field(default=32, ge=1)
    """Random numbers from which a digit is generated."""
    width: int = Field(default=128, ge=1)
    """Width of the two hidden layers of G, and of D."""


def build(config: Config) -> Task:
    """The task of `config.task.args`, with the engines "G" and "D".

    Raises pydantic's ValidationError for wrong arguments, and what `digits.read` raises.
    """
    args = GanArgs.model_validate(config.task.args)
    train, held_out = digits.split(*digits.read())
    return Task(
        models={
            "G": nn.Sequential(mlp(args.noise, args.width, digits.PIXELS), nn.Tanh()),
            "D": mlp(digits.PIXELS, args.width, 1),
        },
        train_data=train,
        eval_data=held_out,
        feeder=partial(feed, args.noise),
        evaluate=partial(evaluate, args.noise, spread(held_out.images_NP)),
        commands={"sample": partial(sample, args.noise)},
    )


def mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """Two hidden layers: [B, inputs] to [B, outputs]."""
    return nn.Sequential(
        *(nn.Linear(inputs, width), nn.LeakyReLU(0.2)),
        *(nn.Linear(width, width), nn.LeakyReLU(0.2)),
        nn.Linear(width, outputs),
    )


def feed(noise: int, engine: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Stats]:
    """The loss of G or of D, in nats, on a batch of digits [B, P]."""
    real_BP = batch[0].to(engine.device, engine.dtype)
    noise_BZ = torch.randn(len(real_BP), noise, device=engine.device, dtype=engine.dtype)
    if engine.name == "G":
        with engine.peers.lend("D") as discriminator:
            logits_B = discriminator(engine(noise_BZ)).float()
        return F.softplus(-logits_B).mean(), {}
    with torch.no_grad(), engine.peers.lend("G") as generator:
        made_BP = generator(noise_BZ)
    logits_2B = engine(torch.cat([real_BP, made_BP])).float().flatten()
    real_B, made_B = logits_2B.chunk(2)
    loss = F.softplus(-real_B).mean() + F.softplus(made_B).mean()
    return loss, {"accuracy": balanced_accuracy(real_B, made_B)}


def evaluate(noise: int, real_spread: Tensor, engine: Any, batch: tuple[Tensor, Tensor]) -> Stats:
    """Of D: its balanced accuracy on held-out and generated digits. Of G: the energy distance of
    those that it generates to the held-out ones, 0 for the same distribution.

    Szekely and Rizzo, "Energy statistics: A class of statistics based on distances", 2013.
    """
    real_BP = batch[0].to(engine.device, engine.dtype)
    noise_SZ = fixed_noise(SAMPLES, noise).to(engine.device, engine.dtype)
    if engine.name == "D":
        with engine.peers.lend("G") as generator:
            made_SP = generator(noise_SZ)
        logits_N = engine(torch.cat([real_BP, made_SP])).float().flatten()
        return {"accuracy": balanced_accuracy(logits_N[: len(real_BP)], logits_N[len(real_BP) :])}
    made_SP = engine(noise_SZ)
    across = torch.cdist(real_BP.float(), made_SP.float()).mean()
    return {"energy_distance": 2 * across - spread(made_SP) - real_spread.to(across.device)}


def balanced_accuracy(real_B: Tensor, made_S: Tensor) -> Tensor:
    """The mean fraction of real and of generated digits whose logits have the right sign."""
    return ((real_B > 0).float().mean() + (made_S < 0).float().mean()) / 2


def spread(points_NP: Tensor) -> Tensor:
    """The mean distance of two different points."""
    return torch.pdist(points_NP.float()).mean()


def fixed_noise(count: int, noise: int) -> Tensor:
    """The same noise [count, Z] every time, drawn without touching the run's generators."""
    return torch.randn(count, noise, generator=torch.Generator().manual_seed(0))


def sample(noise: int, engines: Any, count: str = "6") -> str:
    """Prints digits from the generator's averaged weights, as text."""
    if not (count.isdecimal() and 1 <= int(count) <= MOST_DRAWN):
        raise CommandError(f"count = {count!r}, expected an integer from 1 to {MOST_DRAWN}")
    generator = engines["G"]
    noise_SZ = fixed_noise(int(count), noise).to(generator.device, generator.dtype)
    with torch.no_grad(), generator.averaged():
        made_SP = generator(noise_SZ).float().cpu()
    shades_SHW = ((made_SP.reshape(-1, 8, 8) + 1) / 2 * (len(SHADES) - 1)).round().int()
    rows = shades_SHW.permute(1, 0, 2).tolist()
    lines = ("  ".join("".join(SHADES[s] * 2 for s in row) for row in line) for line in rows)
    return "\n" + "\n".join(lines)
