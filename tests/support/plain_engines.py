"""Several engines in plain PyTorch: one process that does what all ranks of a run do together."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from harness import distributed
from harness.config import Config
from harness.data.sampler import RandomSampler
from harness.task import load_task


class Plain:
    """A model, its optimizer and its average in place of an engine."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, name: str, config: Config, models: Mapping[str, nn.Module]):
        self.name, self.module = name, models[name]
        self.settings = config.engines[name]
        self.peers = self
        self.models = models
        self.filled = 0
        if self.settings.optimizer is None:
            self.module.requires_grad_(False).eval()
        else:
            args: dict[str, Any] = self.settings.optimizer.args
            args["lr"] = self.settings.optimizer.lr
            self.optimizer = torch.optim.AdamW(self.module.parameters(), **args)
        average = get_ema_multi_avg_fn(self.settings.ema_decay or 0.5)
        self.average = AveragedModel(self.module, multi_avg_fn=average)

    def __call__(self, *args: Any) -> Any:
        return self.module(*args)

    @contextmanager
    def lend(self, name: str) -> Iterator[nn.Module]:
        """As `engine.peers.lend`: in a turn all other models are frozen."""
        yield self.models[name]

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Only its own parameters get gradients."""
        trained = [
            p for model in self.models.values() for p in model.parameters() if p.requires_grad
        ]
        for model in self.models.values():
            model.requires_grad_(model is self.module)
        yield
        for parameter in trained:
            parameter.requires_grad_(True)

    def end_micro_batch(self) -> None:
        """Steps if this micro-batch completes the accumulation."""
        self.filled += 1
        if self.filled % self.settings.gradient_accumulation == 0:
            nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.average.update_parameters(self.module)


def plain_loop(config: Config, world_size: int) -> tuple[list[dict[str, float]], dict[str, Plain]]:
    """`(losses by engine of every step, the engines)`: of a config whose stages do not matter.

    Every rank has its own random numbers, as in a run.
    """
    distributed.seed_everything(config.run.seed)
    task = load_task(config)
    generators = []
    for rank in range(world_size):
        distributed.seed_everything(config.run.seed + rank)
        generators.append(torch.get_rng_state())
    engines = {name: Plain(name, config, task.models) for name in config.engines}
    trained = {name: e for name, e in engines.items() if e.settings.role == "train"}
    micro_batches = math.lcm(*(e.settings.gradient_accumulation for e in trained.values()))
    draws = RandomSampler(len(task.train_data), seed=config.run.seed).stream()
    found = []
    for step in range(1, config.run.steps + 1):
        due = {name: e for name, e in trained.items() if step % e.settings.train_every == 0}
        losses = dict.fromkeys(due, 0.0)
        for _ in range(micro_batches):
            size = config.data.micro_batch_size * world_size
            samples = [task.train_data[next(draws)] for _ in range(size)]
            for name, engine in due.items():
                for rank in range(world_size):
                    torch.set_rng_state(generators[rank])
                    with engine.turn():
                        loss, _ = task.feeder(engine, task.collate(samples[rank::world_size]))
                        share = loss / world_size
                        (share / engine.settings.gradient_accumulation).backward()
                    losses[name] += share.item() / micro_batches
                    generators[rank] = torch.get_rng_state()
                engine.end_micro_batch()
        found.append(losses)
    return found, engines
