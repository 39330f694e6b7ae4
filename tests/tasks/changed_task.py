"""The tiny task, whose model `task.args.change` changes between a save and a resume."""

from typing import Any

import torch
from tiny_task import Classifier, Points
from torch import nn
from torch.nn.utils import parametrizations

from harness.config import Config
from harness.task import Task


class OwnLoading(nn.Module):
    """Reads a buffer that it had under another name."""

    def __init__(self, name: str):
        super().__init__()
        self.register_buffer(name, torch.ones(2))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:  # type: ignore[override]
        if f"{prefix}old" in state_dict and hasattr(self, "new"):
            state_dict[f"{prefix}new"] = state_dict.pop(f"{prefix}old")
        super()._load_from_state_dict(state_dict, prefix, *args)


def change(model: Classifier, kind: str) -> None:
    if kind == "buffer":
        model.register_buffer("mask", torch.ones(2, 3))
    elif kind == "no buffer":
        model.scale = 0.5 * torch.ones(1)
        del model._buffers["scale"]
    elif kind == "long buffer":
        model.scale = torch.full((4,), 0.5)
    elif kind == "integer":
        model.scale = torch.ones(1, dtype=torch.int64)
    elif kind == "parameter":
        model.gate = nn.Parameter(torch.ones(3))
    elif kind == "wider":
        model.last = nn.Linear(16, 5)
    elif kind == "untied":
        model.again.weight = nn.Parameter(model.again.weight.detach().clone())
    elif kind == "weight norm":
        parametrizations.weight_norm(model.last)  # has a pre-hook that reads names of old versions
    elif kind in ("old", "new"):
        model.renamed = OwnLoading(kind)


def build(config: Config) -> Task:
    model = Classifier()
    change(model, config.task.args.get("change", ""))
    return Task(models={"net": model}, train_data=Points(96))
