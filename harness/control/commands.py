"""The commands of a run: a closed set.

A command is a frozen dataclass. Its docstring is its line in `help`, and its `forms` are its
grammar: words in lower case are literal, a word in capitals is a value of that kind (`grammar.py`),
which becomes the field of the same name.
"""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Command:
    """A parsed control line."""

    forms: ClassVar[tuple[str, ...]] = ()


@dataclass(frozen=True)
class Query(Command):
    """A command that rank 0 answers by itself, immediately, whatever the run is doing."""


@dataclass(frozen=True)
class StateChange(Command):
    """A command that changes what a checkpoint of this step contains."""


@dataclass(frozen=True)
class Save(Command):
    """Writes a checkpoint; one with a NAME is never deleted."""

    forms = ("save", "save as NAME")
    name: str | None = None


@dataclass(frozen=True)
class Export(Command):
    """Writes plain weights; FORMAT: sft (default) or pt."""

    forms = ("export", "export FORMAT")
    format: str = "sft"


@dataclass(frozen=True)
class Eval(Command):
    """Evaluates on the held-out data."""

    forms = ("eval",)


@dataclass(frozen=True)
class Quit(Command):
    """Ends the run now; saves and exports as at its normal end."""

    forms = ("quit",)


@dataclass(frozen=True)
class EvalQuit(Quit):
    """Evaluates, then ends the run as quit does."""

    forms = ("eval_quit",)


@dataclass(frozen=True)
class QuitUnsaved(Quit):
    """Ends the run now, without saving or exporting."""

    forms = ("quit!",)


@dataclass(frozen=True)
class Interrupt(Quit):
    """Sent by a signal: ends the run now; always saves, never exports."""

    signal: int


@dataclass(frozen=True)
class Pause(Command):
    """Takes no further step until resume; other commands are still executed."""

    forms = ("pause",)


@dataclass(frozen=True)
class Resume(Command):
    """Continues after pause."""

    forms = ("resume",)


@dataclass(frozen=True)
class SetLr(StateChange):
    """Holds the learning rate (of one engine or parameter group) at RATE, ignoring the schedule."""

    forms = ("lr RATE", "lr ENGINE[/GROUP] RATE")
    rate: float
    engine: str | None = None


@dataclass(frozen=True)
class ScaleLr(StateChange):
    """Multiplies the learning rate (of one engine or parameter group) from now on: lr x0.5."""

    forms = ("lr xFACTOR", "lr ENGINE[/GROUP] xFACTOR")
    factor: float
    engine: str | None = None


@dataclass(frozen=True)
class FollowSchedule(StateChange):
    """Returns the learning rate (of one engine or parameter group) to the schedule."""

    forms = ("lr auto", "lr ENGINE[/GROUP] auto")
    engine: str | None = None


@dataclass(frozen=True)
class SetLossScale(StateChange):
    """Sets the loss scale of the engines that compute in fp16."""

    forms = ("loss_scale SCALE", "loss_scale ENGINE SCALE")
    scale: float
    engine: str | None = None


@dataclass(frozen=True)
class SetClip(StateChange):
    """Sets the gradient clipping norm (of one engine); 0 disables clipping."""

    forms = ("clip NORM", "clip ENGINE NORM")
    norm: float
    engine: str | None = None


@dataclass(frozen=True)
class SetSteps(StateChange):
    """Sets the run's last step, and the schedule's, to N."""

    forms = ("steps N",)
    n: int


@dataclass(frozen=True)
class Profile(Command):
    """Traces the next N steps on every rank."""

    forms = ("profile N",)
    n: int


@dataclass(frozen=True)
class SetLog(Command):
    """Sets the log level: debug, info, warning or error."""

    forms = ("log LEVEL",)
    level: str


@dataclass(frozen=True)
class Set(StateChange):
    """Changes a config key; without KEY, lists the keys that can be changed."""

    forms = ("set KEY VALUE",)
    key: str
    value: str


@dataclass(frozen=True)
class Blame(StateChange):
    """Finds the first module whose output or gradient is not finite, in steps that are skipped."""

    forms = ("blame",)


@dataclass(frozen=True)
class At(StateChange):
    """Schedules COMMAND for the end of step STEP; short form: COMMAND@STEP."""

    forms = ("event COMMAND@STEP",)
    command: str
    step: int


@dataclass(frozen=True)
class Every(StateChange):
    """Schedules COMMAND for the end of every step that is a multiple of N."""

    forms = ("event COMMAND every N",)
    command: str
    n: int


@dataclass(frozen=True)
class ClearEvents(StateChange):
    """Removes all events, or event ID."""

    forms = ("event clear", "event clear ID")
    id: int | None = None


@dataclass(frozen=True)
class ShowEvents(Query):
    """Lists the pending events."""

    forms = ("event show",)


@dataclass(frozen=True)
class ShowSettings(Query):
    """Lists the config keys that can be changed, and their values."""

    forms = ("set",)


@dataclass(frozen=True)
class ShowStatus(Query):
    """Shows the progress of the run, and what live commands have changed."""

    forms = ("status",)


@dataclass(frozen=True)
class TimeLeft(Query):
    """Estimates the time left to the end of the run, or to STEP."""

    forms = ("time", "time to STEP")
    step: int | None = None


@dataclass(frozen=True)
class Help(Query):
    """Lists all commands."""

    forms = ("help",)


@dataclass(frozen=True)
class TaskCommand(StateChange):
    """A command that the task defines, with its arguments."""

    name: str
    args: tuple[str, ...] = ()


COMMANDS: tuple[type[Command], ...] = (
    *(Save, Export, Eval, Quit, EvalQuit, QuitUnsaved, Pause, Resume),
    *(SetLr, ScaleLr, FollowSchedule, SetLossScale, SetClip, SetSteps, Profile, Blame, SetLog),
    *(Set, ShowSettings, At, Every, ShowEvents, ClearEvents, ShowStatus, TimeLeft, Help),
)
