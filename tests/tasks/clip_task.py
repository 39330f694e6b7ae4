"""CLIP with its own contrastive loss: images and captions, from a folder to a folder."""

from pathlib import Path
from typing import Any

import torch

from harness.config import Config
from harness.huggingface.export import FolderExport
from harness.huggingface.models import describe
from harness.huggingface.weights import FolderWeights
from harness.task import Task


def build(config: Config) -> Task:
    model = describe(Path(config.task.args["model"]), "other")
    generator = torch.Generator().manual_seed(5)
    pairs = [
        {
            "input_ids": torch.randint(5, 300, (12,), generator=generator),
            "pixel_values": torch.randn(3, 8, 8, generator=generator),
        }
        for _ in range(16)
    ]
    return Task(
        models={"clip": model.build},
        train_data=pairs,
        feeder=feed,
        init_weights={"clip": FolderWeights("clip", model)},
        exporters={"clip": FolderExport(shard_size="10KB")},
    )


def feed(engine: Any, batch: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    output = engine(**batch | {"return_loss": True})
    return output.loss, {"match": output.logits_per_image.detach().diagonal().mean()}
