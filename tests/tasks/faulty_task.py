"""The tiny task, in which the fault of `task.args.fault` happens: the arguments of `fail_at`.

With `task.args.command` that line is on standard input."""

import os
import sys

from harness.config import Config
from harness.task import Task
from harness.testing.faults import inject
from tests.tasks import tiny_task


def build(config: Config) -> Task:
    fault, command = (config.task.args.pop(key) for key in ("fault", "command"))
    inject(**fault)
    if command:
        source, end = os.pipe()
        os.write(end, f"{command}\n".encode())
        os.close(end)
        sys.stdin = os.fdopen(source)
    return tiny_task.build(config)
