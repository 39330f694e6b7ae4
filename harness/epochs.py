"""The length of a run in passes over its data."""

import math
from collections.abc import Mapping

from torch.utils.data import IterableDataset

from harness import distributed
from harness.config import Config
from harness.errors import ConfigError
from harness.task import Task


def with_steps(config: Config, task: Task) -> Config:
    """The config with the `run.steps` in which the run passes `run.epochs` times over the training
    data; as it is, if it has none. Raises ConfigError, on all ranks, if that is not known."""
    epochs = config.run.epochs
    if epochs is None:
        return config
    data, why = task.train_data, ""
    if isinstance(data, Mapping):
        why = "train_data is a mixture"
    elif isinstance(data, IterableDataset) or not hasattr(data, "__getitem__"):
        why = f"train_data is a {type(data).__name__}, which is read in its own order"
    elif config.data.sampler == "batched":
        why = "data.sampler = 'batched' makes micro-batches of different sizes"
    with distributed.raise_on_all_ranks("run.epochs"):
        if why:
            raise ConfigError(f"run.epochs: {why}: set run.steps instead")
    trained = [engine for engine in config.engines.values() if engine.role == "train"]
    accumulation = math.lcm(*(engine.gradient_accumulation for engine in trained))
    samples = config.data.micro_batch_size * distributed.world_size() * accumulation
    steps = {"steps": math.ceil(epochs * len(task.train_data) / samples), "epochs": None}
    return config.model_copy(update={"run": config.run.model_copy(update=steps)})
