"""The tiny classifier on two sources, with or without weighed losses."""

from typing import Any

from harness.config import Config
from harness.task import Task
from tests.tasks.tiny_task import Classifier, Points


def build(config: Config) -> Task:
    args: dict[str, Any] = {"weigh": False, "sources": {"a": 20, "b": 50}} | config.task.args
    sources = {name: Points(count, seed=count) for name, count in args["sources"].items()}
    return Task(
        models={"net": Classifier()},
        train_data=sources,
        weigh=(lambda batch: len(batch[0])) if args["weigh"] else None,
    )
