"""The tiny task, with a loss that is not a number at some steps, on rank 1."""

from typing import Any

import tiny_task
import torch
from torch import Tensor

from harness import distributed
from harness.config import Config
from harness.task import Task, default_feeder


def build(config: Config) -> Task:
    task = tiny_task.build(config)

    def feed(engine: Any, batch: Any) -> tuple[Tensor, Any]:
        loss, stats = default_feeder(engine, batch)
        is_bad = engine.counters.global_step + 1 in config.task.args["steps"]
        return loss * torch.nan if is_bad and distributed.global_rank() == 1 else loss, stats

    task.feeder = feed
    return task
