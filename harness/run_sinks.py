"""What a run reports to: the ledger, metric files, trackers, and sinks of the task's own."""

from contextlib import ExitStack

from harness import distributed
from harness.callbacks.moments import Callbacks
from harness.config import Config
from harness.health.goodput import Ledger
from harness.metrics.recorder import open_task_sink
from harness.metrics.sinks import JsonlSink, Sink, TensorBoardSink
from harness.metrics.status import Status
from harness.metrics.tracker_sink import open_trackers
from harness.task import Task


def open_sinks(
    config: Config, step: int, status: Status, began: float, stack: ExitStack
) -> list[Sink]:
    """The ledger, and the metric sinks, truncated after `step`, on rank 0; elsewhere none.
    Collective."""
    sinks: list[Sink] = []
    with distributed.raise_on_all_ranks(f"run directory {config.run_dir}"):
        if distributed.is_global_leader():
            ledger = Ledger(config.run_dir, status.step, began)
            status.on_activity = ledger.enter
            sinks.append(ledger)
            sinks.append(JsonlSink(config.run_dir / "metrics.jsonl", step))
            if config.metrics.tensorboard:
                sinks.append(TensorBoardSink(config.run_dir / "tensorboard", step))
            sinks += open_trackers(config, max(step, 0))
    for sink in sinks:
        stack.callback(sink.close)
    return sinks


def open_task_sinks(
    task: Task, config: Config, callbacks: Callbacks, stack: ExitStack
) -> list[Sink]:
    """The task's own sinks, on rank 0. Collective. Raises TaskError on all ranks."""
    sinks: list[Sink] = []
    with distributed.raise_on_all_ranks("Task.sinks"):
        for sink in task.sinks if distributed.is_global_leader() else ():
            opened = open_task_sink(sink, config, callbacks.fail)
            sinks.append(stack.enter_context(opened))
    return sinks
