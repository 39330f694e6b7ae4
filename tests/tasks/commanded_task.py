"""The tiny task with commands of its own, and held-out data that rank 1 cannot read."""

from typing import Any

import torch

from harness import distributed
from harness.config import Config
from harness.engine.engines import Engines
from harness.task import Task
from tests.tasks import tiny_task


class Broken(tiny_task.Points):
    """Points that rank 1 cannot read."""

    def __getitem__(self, index: int) -> Any:
        if distributed.global_rank() == 1:
            raise RuntimeError("it cannot be read")
        return super().__getitem__(index)


def greet(engines: Engines, whom: str) -> str:
    """Greets somebody."""
    return f"hello {whom}, from {', '.join(engines)}"


def number(engines: Engines) -> Any:
    """Answers with what is not a text."""
    return torch.ones(1)


def fail(engines: Engines, rank: str) -> None:
    """Fails on one rank alone."""
    if distributed.global_rank() == int(rank):
        raise RuntimeError(f"rank {rank} has failed")


def build(config: Config) -> Task:
    task = tiny_task.build(config)
    task.eval_data = Broken(10)
    task.commands = {"greet": greet, "number": number, "fail": fail}
    return task
