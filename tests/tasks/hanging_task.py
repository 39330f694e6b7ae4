"""The tiny task, a step of which goes wrong on some rank: for tests of the watchdog.

`task.args`: `how` of HOW, on `rank` (-1: all), at step `at`.
"""

import ctypes
import os
import signal
import time
from typing import Any

import torch
import torch.distributed as dist

from harness.config import Config
from harness.engine.engine import Engine
from harness.task import Task, default_feeder
from tests.tasks.tiny_task import Classifier, Points


def hold_the_gil() -> None:
    library, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
    for _ in range(2):  # a deadlock
        library.pthread_mutex_lock(mutex)


HOW = {
    "sleep": lambda: time.sleep(1000),
    "gil": hold_the_gil,
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda: os._exit(0),
    "collective": lambda: dist.all_reduce(torch.ones(3)),
    "raise": lambda: {}["speaker"],
}


def build(config: Config) -> Task:
    args = config.task.args

    def feeder(engine: Engine, batch: Any) -> Any:
        is_due = torch.is_grad_enabled() and engine.counters.global_step + 1 == args["at"]
        if is_due and args["rank"] in (-1, int(os.environ["RANK"])):
            HOW[args["how"]]()
        return default_feeder(engine, batch)

    return Task(models={"net": Classifier()}, train_data=Points(96), feeder=feeder)
