"""The tiny task with replaced modules, also while ZeRO 3 shards the model as it is built."""

from contextlib import ExitStack
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from harness.config import Config
from harness.task import Task
from harness.wrapper import ModuleChange, inject, replace
from tests.tasks import tiny_task


class Same(nn.Linear):
    """nn.Linear under another name."""


def same_from(old: nn.Module) -> nn.Module:
    """A new module of the same shape, with weights that are soon replaced."""
    assert isinstance(old, nn.Linear)
    return Same(old.in_features, old.out_features, bias=old.bias is not None)


class Twice(nn.Module):
    """A module that contains another one, and a parameter of its own."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.gain = nn.Parameter(torch.full((1,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.gain


def changed(model: nn.Module) -> list[ModuleChange]:
    """Replaces all linear layers, in the tests' runs."""
    return replace(model, nn.Linear, Same)


def build(config: Config) -> Task:
    """`zero_init`: whether ZeRO 3 shards each module as it is built, "inside" of the context or
    "around" it."""
    (engine,) = config.engines.values()
    contexts: list[Any] = [inject(nn.Linear, Same)]
    if where := config.task.args.get("zero_init"):
        batch = {"train_micro_batch_size_per_gpu": config.data.micro_batch_size}
        sharded = deepspeed.zero.Init(config_dict_or_path=engine.deepspeed() | batch)
        contexts.insert(0 if where == "around" else 1, sharded)
    plain = nn.Linear.__init__
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        task = tiny_task.build(config)
    (model,) = task.models.values()
    kinds = {type(module) for module in model.modules()}
    assert Same in kinds and nn.Linear not in kinds
    assert nn.Linear.__init__ is plain and "__init__" not in vars(Same)
    assert all(hasattr(p, "ds_id") == bool(where) for p in model.parameters())
    return task
