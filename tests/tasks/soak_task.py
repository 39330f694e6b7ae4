"""The tiny task with dropout, which notes the samples of every step, and fails on command.

`HARNESS_FAULT`, "KIND RANK STEP" (rank -1: all), is what the forward of that step does."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness import distributed
from harness.config import Config
from harness.task import Task, default_feeder
from tests.tasks.tiny_task import Classifier, Points


class Numbered(Points):
    """With the number of each sample."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:  # type: ignore[override]
        return *super().__getitem__(index), index


def misbehave(kind: str) -> None:
    if kind == "raise":
        raise ValueError("the task is unwell")
    if kind == "exit":
        sys.exit(0)
    if kind == "_exit":
        os._exit(7)
    if kind == "oom":
        raise torch.OutOfMemoryError("CUDA out of memory (simulated)")


def build(config: Config) -> Task:
    fault, rank, step = (os.environ.get("HARNESS_FAULT") or "none 0 0").split()
    notes = Path(config.task.args["notes"])

    def feed(engine: Any, batch: Any) -> tuple[Tensor, Any]:
        points, classes, numbers = batch
        own, now = distributed.global_rank(), engine.counters.global_step + 1
        with (notes / f"rank-{own}.jsonl").open("a") as file:
            file.write(json.dumps([now, numbers.tolist()]) + "\n")
        if now == int(step) and int(rank) in (-1, own):
            misbehave(fault)
        return default_feeder(engine, [points, classes])

    models = {name: Classifier(dropout=0.2) for name in config.engines}
    data = Numbered(config.task.args["samples"])
    return Task(models=models, train_data=data, feeder=feed)
