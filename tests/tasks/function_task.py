"""A model that initializes the weights of inner modules itself, built by a function or before."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.config import Config
from harness.task import Task
from tests.tasks.tiny_task import Points


class Block(nn.Module):
    scale: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Linear(width, width)
        self.gain = nn.Parameter(torch.randn(width))
        self.register_buffer("scale", torch.full((1,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.up(x)) * self.gain * self.scale.to(x)


class Model(nn.Module):
    def __init__(self, width: int = 12):
        super().__init__()
        self.first = nn.Linear(6, width)
        self.blocks = nn.Sequential(Block(width), Block(width), Block(width))
        self.tied = nn.Linear(width, 3)
        self.last = nn.Linear(width, 3)
        self.tied.weight = self.last.weight
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(width, width))
        self.numel = sum(parameter.numel() for parameter in self.parameters())
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        self.apply(self.init_biases)
        with torch.no_grad():
            self.blocks[0].gain.mul_(0.1)  # type: ignore[operator]
            self.blocks[1].gain.data.copy_(self.blocks[0].gain.data + 0.01)  # type: ignore
            self.blocks[2].load_state_dict(self.blocks[1].state_dict())

    @staticmethod
    def init_biases(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.bias, std=0.02)

    def forward(self, points: Tensor, classes: Tensor) -> Tensor:
        assert self.numel > 500
        hidden = self.normed(self.blocks(self.first(points)))
        logits = self.last(hidden) + self.tied(hidden)
        self.loss = F.cross_entropy(logits.float(), classes)
        return logits


class Same(nn.Linear):
    """Replaces a linear layer."""


def build(config: Config) -> Task:
    if config.task.args.get("fails"):
        return Task(models={"net": lambda: nn.Linear(0, -1)}, train_data=Points(8))
    models = dict.fromkeys(config.engines, Model)
    is_function = config.task.args["function"]
    return Task(
        models=models if is_function else {name: model() for name, model in models.items()},
        train_data=Points(48),
    )
