"""The measure: a plain PyTorch loop in one process that computes what all ranks of a run mean.

The gradient of a step is the mean over all micro-batches of all ranks. A trained parameter that got
none has a gradient of zero. In bf16 the model computes with rounded copies of fp32 masters, which
the optimizer steps, and gradients accumulate in bf16, as in any loop. Buffers that training changes
are each rank's own within a step, and rank 0's for all afterwards.
"""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from harness.utils import import_path
from tests.zoo.data import micro_batch
from tests.zoo.entry import SEED, STEPS, Entry, Layout

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "autocast": torch.float32}


@dataclass
class Trained:
    """What a training has come to."""

    losses: list[dict[str, float]] = field(default_factory=list)
    """Of every step, by engine."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Of trained engines, at the end: fp32 masters, frozen weights and persistent buffers as
    ENGINE/NAME, and the EMA of a master as ENGINE.ema/NAME."""


class PlainEngine:
    """A model and its optimizer, in place of an engine."""

    device = torch.device("cpu")
    peers: "Peers"

    def __init__(self, name: str, module: nn.Module, entry: Entry, layout: Layout):
        self.name, self.module = name, module
        self.settings = entry.engines.get(name, {})
        self.clip = entry.clip
        self.gradient_accumulation = layout.accumulation
        self.counters = SimpleNamespace(micro_step=0)
        self.dtype = DTYPES[layout.precision]
        self.is_autocast = layout.precision == "autocast"
        self.is_trained = self.settings.get("role") != "teacher"
        if lora := self.settings.get("lora"):
            _adapt(module, lora)
        if not self.is_trained:
            module.requires_grad_(False).eval()
        for path, parameter in module.named_parameters():
            if any(_matches(p, path) for p in self.settings.get("frozen", ())):
                parameter.requires_grad_(False)
            parameter.data = parameter.data.to(self.dtype)
        if self.settings.get("buffer_dtype") == "model":
            for buffer in module.buffers():
                buffer.data = buffer.data.to(self.dtype) if buffer.is_floating_point() else buffer
        trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.trained = list(trained.values())
        self.masters = [
            p if self.dtype == torch.float32 else p.detach().float().requires_grad_()
            for p in self.trained
        ]
        self.sums = [[torch.zeros_like(p) for p in self.trained] for _ in range(layout.ranks)]
        self.averages: list[Tensor] = []
        self.buffers = [
            {path: buffer.clone() for path, buffer in module.named_buffers()}
            for _ in range(layout.ranks)
        ]
        if self.is_trained:
            self.optimizer = self._optimizer(entry.optimizer, list(trained))

    def _optimizer(self, table: Mapping[str, Any], names: list[str]) -> torch.optim.Optimizer:
        settings = {**table, **self.settings.get("optimizer", {})}
        groups = settings.pop("groups", ())
        kind = import_path(settings.pop("name"))
        found: list[dict[str, Any]] = [{"params": []} for _ in range(len(groups) + 1)]
        for chosen, group in zip(found, groups, strict=False):
            chosen |= {key: value for key, value in group.items() if key not in ("name", "match")}
        for name, master in zip(names, self.masters, strict=True):
            number = next((n for n, g in enumerate(groups) if _matches(g["match"], name)), -1)
            found[number]["params"].append(master)
        return kind([group for group in found if group["params"]], **settings)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        autocast = torch.autocast("cpu", torch.bfloat16) if self.is_autocast else nullcontext()
        with autocast:
            return self.module(*args, **kwargs)

    @contextmanager
    def as_rank(self, rank: int) -> Iterator[None]:
        """With that rank's buffers."""
        for path, buffer in self.module.named_buffers():
            buffer.data.copy_(self.buffers[rank][path])
        yield
        self.buffers[rank] = {p: b.detach().clone() for p, b in self.module.named_buffers()}

    def collect(self, rank: int, share: float) -> None:
        """Adds the gradients of a micro-batch, times `share`, to the rank's sums."""
        for parameter, total in zip(self.trained, self.sums[rank], strict=True):
            if parameter.grad is not None:
                total.add_(parameter.grad, alpha=share)
                parameter.grad = None

    def step(self) -> None:
        """Steps the optimizer."""
        for master, *per_rank in zip(self.masters, *self.sums, strict=True):
            master.grad = torch.stack(per_rank).sum(0).float()
            for total in per_rank:
                total.zero_()
        if self.clip:
            nn.utils.clip_grad_norm_(self.masters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._write_weights()
        self.buffers = [self.buffers[0]] * len(self.buffers)
        if decay := self.settings.get("ema_decay"):
            masters = [master.detach().clone() for master in self.masters]
            for number, average in enumerate(self.averages):
                masters[number] = average * decay + masters[number] * (1 - decay)
            self.averages = masters

    def _write_weights(self) -> None:
        for parameter, master in zip(self.trained, self.masters, strict=True):
            if master is not parameter:
                parameter.data.copy_(master)

    @contextmanager
    def edit_weights(self) -> Iterator[nn.Module]:
        """The model, whose weights may be changed; elements that were have a new master."""
        yield self.module
        for parameter, master in zip(self.trained, self.masters, strict=True):
            is_same = master.to(self.dtype) == parameter
            master.data.copy_(torch.where(is_same, master, parameter.float()))

    def tensors(self) -> dict[str, Tensor]:
        """As in `Trained.tensors`."""
        masters = dict(zip(self.trained, self.masters, strict=True))
        averages = dict(zip(self.trained, self.averages, strict=False))
        persistent = self.module.state_dict().keys()
        found: dict[str, Tensor] = {}
        for path, parameter in self.module.named_parameters():
            found[f"{self.name}/{path}"] = masters.get(parameter, parameter)
            if parameter in averages:
                found[f"{self.name}.ema/{path}"] = averages[parameter]
        for path, buffer in self.buffers[0].items():
            if path in persistent:
                found[f"{self.name}/{path}"] = buffer
        return {path: tensor.detach().clone() for path, tensor in found.items()}


class Peers(dict[str, PlainEngine]):
    """All engines, by name."""

    @contextmanager
    def lend(self, name: str) -> Iterator[nn.Module]:
        """Another engine's model: `turn` has frozen it."""
        yield self[name].module

    @contextmanager
    def turn(self, name: str, rank: int) -> Iterator[None]:
        """Only the parameters of one engine get gradients; all have that rank's buffers."""
        for engine in self.values():
            for parameter in engine.trained:
                parameter.requires_grad_(engine.name == name)
        with ExitStack() as stack:
            for engine in self.values():
                stack.enter_context(engine.as_rank(rank))
            yield


def train(entry: Entry, layout: Layout) -> tuple[Trained, dict[str, Tensor]]:
    """What the layout should come to, and the tensors that it starts from."""
    torch.manual_seed(SEED)
    models = entry.models()
    engines = Peers({n: PlainEngine(n, model, entry, layout) for n, model in models.items()})
    for engine in engines.values():
        engine.peers = engines
    start = _all_tensors(engines)
    trained = Trained()
    for step in range(STEPS):
        trained.losses.append(_step(engines, entry, layout, step))
    trained.tensors = _all_tensors(engines)
    return trained, start


def _step(engines: Peers, entry: Entry, layout: Layout, step: int) -> dict[str, float]:
    due = [
        engine
        for engine in engines.values()
        if engine.is_trained and (step + 1) % engine.settings.get("train_every", 1) == 0
    ]
    numbers = range(step * layout.accumulation, (step + 1) * layout.accumulation)
    batches = {
        (number, rank): micro_batch(entry, number, rank)
        for number in numbers
        for rank in range(layout.ranks)
    }
    weights = {key: entry.weigh(batch) if entry.weigh else 1 for key, batch in batches.items()}
    total = math.fsum(weights.values())
    losses = dict.fromkeys((engine.name for engine in due), 0.0)
    for number in numbers:
        for engine in due:
            for rank in range(layout.ranks):
                with engines.turn(engine.name, rank):
                    loss, _ = entry.feeder(engine, batches[number, rank])
                    loss.backward()
                share = weights[number, rank] / total
                engine.collect(rank, share)
                losses[engine.name] += loss.item() * share
            engine.counters.micro_step += 1
            if number == numbers[-1]:
                engine.step()
    return losses


def _all_tensors(engines: Peers) -> dict[str, Tensor]:
    trained = [engine for engine in engines.values() if engine.is_trained]
    return {path: tensor for engine in trained for path, tensor in engine.tensors().items()}


def _matches(pattern: str, path: str) -> bool:
    """Whether it matches the full name of a parameter, or of a module that has it."""
    return re.fullmatch(rf"({pattern})(\..*)?", path) is not None


def _adapt(module: nn.Module, settings: Mapping[str, Any]) -> None:
    """Injects peft's adapters, as the run does."""
    import peft

    config = peft.LoraConfig(
        r=settings["rank"], lora_alpha=settings["alpha"], target_modules=settings["targets"]
    )
    peft.inject_adapter_in_model(config, module)
