"""The tiny task with dropout, which notes the samples of every step, and fails on command.

`HARNESS_FAULT`, "KIND RANK STEP" (rank -1: all), is what the forward of that step does. The loss of
rank 1 is NaN in the steps `nan_steps`, and that of any rank with a sample of `nan_samples`."""

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
    args: dict[str, Any] = {"nan_steps": [], "nan_samples": []} | config.task.args
    notes = Path(args["notes"])

    nan_samples = set(args["nan_samples"])

    def feed(engine: Any, batch: Any) -> tuple[Tensor, Any]:
        points, classes, numbers = batch
        own, now = distributed.global_rank(), engine.counters.global_step + 1
        with (notes / f"rank-{own}.jsonl").open("a") as file:
            file.write(json.dumps([now, numbers.tolist()]) + "\n")
        if now == int(step) and int(rank) in (-1, own):
            misbehave(fault)
        loss, stats = default_feeder(engine, [points, classes])
        is_bad = (own == 1 and now in args["nan_steps"]) or set(numbers.tolist()) & nan_samples
        return (loss * torch.nan if is_bad else loss), stats

    models = {name: Classifier(dropout=0.2) for name in config.engines}
    data = Numbered(args["samples"])
    return Task(models=models, train_data=data, feeder=feed)
