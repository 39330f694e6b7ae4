"""Executes commands between two steps of a run, and answers queries.

This is not part of control/, which transports commands and knows neither trainer nor engines.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from harness.control import commands as c
from harness.control.bus import Reported, Ticket
from harness.control.events import Event
from harness.control.grammar import Grammar
from harness.control.live import LiveConfig, live_keys, value_of
from harness.data.step_batches import StepBatches
from harness.data.train_batches import mixture_weights
from harness.engine.engines import Engines
from harness.errors import CommandError
from harness.evaluate import check_best_metric
from harness.health import phases
from harness.logs import set_log_level
from harness.metrics.progress import Progress
from harness.metrics.status import Status
from harness.metrics.trace import Traces
from harness.task import Task, check_eval_data


class CommandTarget(Protocol):
    """What commands are executed on: `trainer.Trainer`."""

    live: LiveConfig
    task: Task
    engines: Engines
    batches: StepBatches
    traces: Traces
    status: Status
    progress: Progress
    evaluated: set[str]
    paused: bool
    ending: c.Quit | None

    def is_over(self) -> bool: ...

    def begin(self) -> None: ...

    def evaluate(self) -> str | None: ...

    def export(self, format: str = "sft") -> Path: ...


def execute(run: CommandTarget, ticket: Ticket) -> str | None:
    """Executes a command other than save. Every rank calls it.

    Returns the answer, or None if it follows later. Raises HarnessError if the command fails.
    """
    with phases.during("commands"):
        return _execute(run, ticket)


def _execute(run: CommandTarget, ticket: Ticket) -> str | None:
    match ticket.command:
        case c.Export(format):
            return f"exported {run.export(format)}"
        case c.Eval():
            return _evaluate(run)
        case c.Quit() as command:
            run.ending = command
            return "ending the run"
        case c.Pause() | c.Resume() as command:
            return _pause_or_resume(run, command)
        case c.SetLr() | c.ScaleLr() | c.FollowSchedule() as command:
            return _change_lr(run.engines, command)
        case c.SetLossScale(scale, name):
            return _set_loss_scale(run.engines, scale, name)
        case c.SetClip(norm, name):
            return _set_clip(run.engines, norm, name)
        case c.SetSteps(n):
            return _set(run, "run.steps", str(n))
        case c.Set(key, value):
            return _set(run, key, value)
        case c.Blame():
            return _set(run, "health.blame", "true")
        case c.Profile(n):
            return run.traces.start(run.engines.global_step, n, ticket)
        case c.SetLog(level):
            set_log_level(level)
            return f"log level {level}"
        case c.At() | c.Every() as command:
            return _add_event(run, command)
        case c.ClearEvents(number):
            return _clear_events(run.live, number)
        case c.TaskCommand(name, args):
            result = run.task.commands[name](run.engines, *args)
            for engine in run.engines.trained:
                engine.edits.check()
            return "done" if result is None else str(result)
        case command:
            raise AssertionError(command)


def answer(
    query: c.Query, status: Status, live: LiveConfig, engines: Engines, grammar: Grammar
) -> Reported:
    """Answers a query on rank 0, from any thread."""
    if isinstance(query, c.ShowStatus):
        changes = [*engines.describe_overrides(), *live.changes()]
        return "\n".join([status.line(), *changes]), status.values() | {"changes": changes}
    return _text(query, status, live, grammar), None


def _text(query: c.Query, status: Status, live: LiveConfig, grammar: Grammar) -> str:
    match query:
        case c.Help():
            return grammar.help()
        case c.TimeLeft(step):
            return status.time_left(step)
        case c.ShowEvents():
            return _joined(live.events, "\n") or "no event is pending"
        case c.ShowSettings():
            return "\n".join(
                f"{key} = {value_of(live.config, key)}" for key in live_keys(live.config)
            )
        case _:
            raise AssertionError(query)


def _evaluate(run: CommandTarget) -> str:
    result = run.evaluate()
    if result is None:
        has_data = run.task.eval_data is not None
        raise CommandError(
            "interrupted: the run is ending" if has_data else "the task has no eval_data"
        )
    return result


def _pause_or_resume(run: CommandTarget, command: c.Pause | c.Resume) -> str:
    if isinstance(command, c.Pause):
        if run.is_over():
            raise CommandError("this was the last step")
        run.paused = True
        return "paused until resume"
    if not run.paused:
        raise CommandError("the run is not paused")
    run.paused = False
    return "resumed"


def _change_lr(engines: Engines, command: c.SetLr | c.ScaleLr | c.FollowSchedule) -> str:
    name, _, group = (command.engine or "").partition("/")
    for engine in engines.chosen(name or None):
        match command:
            case c.SetLr(rate):
                engine.overrides.set_lr(rate, group or None)
            case c.ScaleLr(factor):
                engine.overrides.scale_lr(factor, group or None)
            case c.FollowSchedule():
                engine.overrides.follow_schedule(group or None)
    return _rates(engines)


def _rates(engines: Engines) -> str:
    """The learning rates of the next step."""
    return ", ".join(
        f"{engine.name}: " + ", ".join(f"{k} {lr:g}" for k, lr in engine.overrides.rates().items())
        for engine in engines.trained
    )


def _set_loss_scale(engines: Engines, scale: float, name: str | None) -> str:
    scaled = [engine for engine in engines.chosen(name) if engine.has_loss_scale]
    if not scaled:
        raise CommandError("there is no loss scale: the engine computes in fp32 or bf16")
    for engine in scaled:
        engine.set_loss_scale(scale)
    return f"loss scale {scale:g}"


def _set_clip(engines: Engines, norm: float, name: str | None) -> str:
    for engine in engines.chosen(name):
        engine.overrides.set_clip(norm)
    return f"gradients are clipped to {norm:g}" if norm else "gradients are not clipped"


def _set(run: CommandTarget, key: str, text: str) -> str:
    """Changes a live key, and what depends on it. Raises HarnessError, with nothing changed."""
    old, new = run.live.config, run.live.with_changes({key: text})
    check_eval_data(run.task, new)
    check_best_metric(new, run.task, run.evaluated)
    before = _rates(run.engines)
    if new.run.steps != old.run.steps:
        _move_end(run, new.run.steps)
    if new.data.mix != old.data.mix:  # from the next step on, which may have been fetched ahead
        run.batches.set_weights(mixture_weights(new.data))
        run.begin()
    run.live.set(key, text)
    rates, was = _rates(run.engines), f"{key} = {value_of(new, key)} (was {value_of(old, key)})"
    return was if rates == before else f"{was}; {rates} (was {before})"


def _move_end(run: CommandTarget, steps: int) -> None:
    if steps <= run.engines.global_step:
        raise CommandError(
            f"the run is already at step {run.engines.global_step}: use quit to end it"
        )
    run.engines.set_total_steps(steps)
    run.status.steps = steps
    run.progress.set_steps(steps)


def _add_event(run: CommandTarget, command: c.At | c.Every) -> str:
    step, events = run.engines.global_step, run.live.events
    if isinstance(command, c.Every):
        return str(events.add(command.command, step, every=command.n))
    if command.step < step:
        raise CommandError(f"step {command.step} has already passed: the run is at {step}")
    return str(events.add(command.command, step, at=command.step))


def _clear_events(live: LiveConfig, number: int | None) -> str:
    removed = live.events.clear(number)
    if number is not None and not removed:
        raise CommandError(f"there is no event {number}; event show lists them")
    return f"removed {_joined(removed, '; ')}" if removed else "no event is pending"


def _joined(events: Iterable[Event], separator: str) -> str:
    return separator.join(map(str, events))
