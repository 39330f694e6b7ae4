"""What a run can be told or asked: a closed set of commands.

A command is a frozen dataclass. Its docstring is its help, and its `forms` are its grammar: words
in lower case stand for themselves, words in capitals for a value of that kind (`grammar.py`), which
becomes the field of the same name.
"""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Command:
    """Something that the run can be told, or asked."""

    forms: ClassVar[tuple[str, ...]] = ()


@dataclass(frozen=True)
class Query(Command):
    """A question: rank 0 answers it alone and at once, whatever the run is doing."""


@dataclass(frozen=True)
class Change(Command):
    """Alters what a checkpoint of this step would hold."""


@dataclass(frozen=True)
class Save(Command):
    """Writes a checkpoint; one with a NAME is never pruned."""

    forms = ("save", "save as NAME")
    name: str | None = None


@dataclass(frozen=True)
class Export(Command):
    """Writes plain weights; FORMAT: sft (as by default) or pt."""

    forms = ("export", "export FORMAT")
    format: str = "sft"


@dataclass(frozen=True)
class Eval(Command):
    """Evaluates on the held-out data."""

    forms = ("eval",)


@dataclass(frozen=True)
class Quit(Command):
    """Ends the run here, saved and exported as at its end."""

    forms = ("quit",)


@dataclass(frozen=True)
class EvalQuit(Quit):
    """Evaluates, then does as quit."""

    forms = ("eval_quit",)


@dataclass(frozen=True)
class QuitUnsaved(Quit):
    """Ends the run here, and saves and exports nothing."""

    forms = ("quit!",)


@dataclass(frozen=True)
class Interrupt(Quit):
    """A signal's doing: ends the run here, saved in any case, and not exported."""

    signal: int


@dataclass(frozen=True)
class Pause(Command):
    """Takes no further step until resume; other commands are obeyed meanwhile."""

    forms = ("pause",)


@dataclass(frozen=True)
class Resume(Command):
    """Goes on after pause."""

    forms = ("resume",)


@dataclass(frozen=True)
class SetLr(Change):
    """Holds the learning rate (of one engine) at RATE, whatever the schedule says."""

    forms = ("lr RATE", "lr ENGINE RATE")
    rate: float
    engine: str | None = None


@dataclass(frozen=True)
class ScaleLr(Change):
    """Multiplies the learning rate (of one engine) from here on, as in lr x0.5."""

    forms = ("lr xFACTOR", "lr ENGINE xFACTOR")
    factor: float
    engine: str | None = None


@dataclass(frozen=True)
class FollowSchedule(Change):
    """Gives the learning rate (of one engine) back to the schedule."""

    forms = ("lr auto", "lr ENGINE auto")
    engine: str | None = None


@dataclass(frozen=True)
class SetLossScale(Change):
    """Sets the loss scale of the engines that compute in fp16."""

    forms = ("loss_scale SCALE", "loss_scale ENGINE SCALE")
    scale: float
    engine: str | None = None


@dataclass(frozen=True)
class SetClip(Change):
    """Clips gradients (of one engine) to NORM; 0: not at all."""

    forms = ("clip NORM", "clip ENGINE NORM")
    norm: float
    engine: str | None = None


@dataclass(frozen=True)
class SetSteps(Change):
    """Moves the end of the run, and with it the schedule's, to step N."""

    forms = ("steps N",)
    n: int


@dataclass(frozen=True)
class Profile(Command):
    """Traces the next N steps on every rank."""

    forms = ("profile N",)
    n: int


@dataclass(frozen=True)
class SetLog(Command):
    """Logs from LEVEL on: debug, info, warning or error."""

    forms = ("log LEVEL",)
    level: str


@dataclass(frozen=True)
class Set(Change):
    """Changes a key of the config; `set` alone lists those that can be."""

    forms = ("set KEY VALUE",)
    key: str
    value: str


@dataclass(frozen=True)
class At(Change):
    """Obeys COMMAND at the end of step STEP; COMMAND@STEP alone does as well."""

    forms = ("event COMMAND@STEP",)
    command: str
    step: int


@dataclass(frozen=True)
class Every(Change):
    """Obeys COMMAND at the end of every step that is a multiple of N."""

    forms = ("event COMMAND every N",)
    command: str
    n: int


@dataclass(frozen=True)
class ClearEvents(Change):
    """Forgets all events, or the one of number ID."""

    forms = ("event clear", "event clear ID")
    id: int | None = None


@dataclass(frozen=True)
class ShowEvents(Query):
    """Lists the pending events."""

    forms = ("event show",)


@dataclass(frozen=True)
class ShowSettings(Query):
    """Lists the keys of the config that can be set, and their values."""

    forms = ("set",)


@dataclass(frozen=True)
class Status(Query):
    """Tells where the run is and what live commands have changed."""

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
class TaskCommand(Change):
    """A command of the task's own, with its arguments."""

    name: str
    args: tuple[str, ...] = ()


COMMANDS: tuple[type[Command], ...] = (
    *(Save, Export, Eval, Quit, EvalQuit, QuitUnsaved, Pause, Resume),
    *(SetLr, ScaleLr, FollowSchedule, SetLossScale, SetClip, SetSteps, Profile, SetLog),
    *(Set, ShowSettings, At, Every, ShowEvents, ClearEvents, Status, TimeLeft, Help),
)
