"""What each command does to a run, between two steps, and what is answered."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from harness.control import commands as c
from harness.control.bus import Ticket
from harness.control.events import Event
from harness.control.grammar import Grammar
from harness.control.live import Live, live_keys, value_of
from harness.engine.engines import Engines
from harness.errors import CommandError
from harness.evaluate import check_eval_data
from harness.metrics.progress import set_log_level
from harness.metrics.status import Status

if TYPE_CHECKING:
    from harness.trainer import Trainer


def execute(trainer: "Trainer", ticket: Ticket) -> str | None:
    """Obeys a command, on every rank alike. Returns what to answer, or None if that is to follow.

    Raises HarnessError if it cannot be obeyed.
    """
    engines, live = trainer.engines, trainer.live
    match ticket.command:
        case c.Save(name):
            return trainer.save(name, ticket)
        case c.Export(format):
            return f"exported {trainer.export(format)}"
        case c.Eval():
            found = trainer.evaluate()
            if found is None:
                has_data = trainer.task.eval_data is not None
                raise CommandError(
                    "given up: the run is to end" if has_data else "the task has no eval_data"
                )
            return found
        case c.Quit() as command:
            trainer.ending = command
            return "the run ends here"
        case c.Pause():
            if trainer.is_over():
                raise CommandError("it came too late: this was the last step")
            trainer.paused = True
            return "paused; resume goes on"
        case c.Resume():
            if not trainer.paused:
                raise CommandError("the run is not paused")
            trainer.paused = False
            return "going on"
        case c.SetLr(rate, name):
            for engine in engines.chosen(name):
                engine.set_lr(rate)
            return _rates(engines)
        case c.ScaleLr(factor, name):
            for engine in engines.chosen(name):
                engine.scale_lr(factor)
            return _rates(engines)
        case c.FollowSchedule(name):
            for engine in engines.chosen(name):
                engine.follow_schedule()
            return _rates(engines)
        case c.SetLossScale(scale, name):
            scaled = [engine for engine in engines.chosen(name) if engine.has_loss_scale]
            if not scaled:
                raise CommandError("there is no loss scale: it computes in fp32 or bf16")
            for engine in scaled:
                engine.set_loss_scale(scale)
            return f"loss scale {scale:g}"
        case c.SetClip(norm, name):
            for engine in engines.chosen(name):
                engine.set_clip(norm)
            return f"gradients are clipped to {norm:g}" if norm else "gradients are not clipped"
        case c.SetSteps(n):
            return _set(trainer, "run.steps", str(n))
        case c.Set(key, value):
            return _set(trainer, key, value)
        case c.Profile(n):
            return trainer.trace(n, ticket)
        case c.SetLog(level):
            set_log_level(level)
            return f"logging from {level} on"
        case c.At(text, step):
            if step < engines.global_step:
                raise CommandError(f"step {step} is behind: the run is at {engines.global_step}")
            return str(live.events.add(text, engines.global_step, at=step))
        case c.Every(text, n):
            return str(live.events.add(text, engines.global_step, every=n))
        case c.ClearEvents(number):
            gone = live.events.clear(number)
            if number is not None and not gone:
                raise CommandError(f"there is no event {number}; event show lists them")
            return f"forgot {_listed(gone, '; ')}" if gone else "there was no event"
        case c.TaskCommand(name, args):
            said = trainer.task.commands[name](engines, *args)
            return "done" if said is None else str(said)
        case command:
            raise AssertionError(command)


def answer(query: c.Query, status: Status, live: Live, engines: Engines, grammar: Grammar) -> str:
    """Answers a query on rank 0, from any thread."""
    match query:
        case c.Help():
            return grammar.help()
        case c.Status():
            return "\n".join([status.line(), *engines.overrides(), *live.describe()])
        case c.TimeLeft(step):
            return status.time_left(step)
        case c.ShowEvents():
            return _listed(live.events, "\n") or "no event is pending"
        case c.ShowSettings():
            return "\n".join(f"{key} = {value_of(live.config, key)}" for key in live_keys())
        case _:
            raise AssertionError(query)


def _set(trainer: "Trainer", key: str, text: str) -> str:
    """Changes a live key, and what depends on it. Raises HarnessError, with nothing changed."""
    before, now = trainer.live.config, trainer.live.with_changes({key: text})
    check_eval_data(trainer.task, now)
    if now.run.steps != before.run.steps:
        trainer.move_end(now.run.steps)
    trainer.live.set(key, text)
    return f"{key} = {value_of(now, key)} (it was {value_of(before, key)})"


def _rates(engines: Engines) -> str:
    return ", ".join(f"{name}: lr {lr:g}" for name, lr in engines.get_lr().items())


def _listed(events: Iterable[Event], between: str) -> str:
    return between.join(map(str, events))
