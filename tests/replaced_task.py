"""The tiny task with modules of its own, and a task whose models are built in the context."""

import torch
from torch import Tensor, nn

from harness.config import Config
from harness.task import Task
from harness.wrapper import Change, inject, replace
from tests import tiny_task


class Same(nn.Linear):
    """No different from nn.Linear."""


def same_from(old: nn.Module) -> nn.Module:
    """A new module of the same shape, with weights that are soon gone."""
    assert isinstance(old, nn.Linear)
    return Same(old.in_features, old.out_features, bias=old.bias is not None)


class Twice(nn.Module):
    """A module that holds another one, and something of its own."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.gain = nn.Parameter(torch.full((1,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.gain


def changed(model: nn.Module) -> list[Change]:
    """What the tests' runs replace: all linear layers."""
    return replace(model, nn.Linear, Same)


def build(config: Config) -> Task:
    with inject(nn.Linear, Same):
        task = tiny_task.build(config)
    kinds = {type(m) for model in task.models.values() for m in model.modules()}
    assert Same in kinds and nn.Linear not in kinds
    return task
