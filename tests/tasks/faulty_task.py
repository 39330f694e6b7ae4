"""The tiny task, in which the fault of `task.args.fault` happens: the arguments of `fail_at`."""

from harness.config import Config
from harness.task import Task
from harness.testing.faults import inject
from tests.tasks import tiny_task


def build(config: Config) -> Task:
    fault = config.task.args.pop("fault")
    inject(**fault)
    return tiny_task.build(config)
