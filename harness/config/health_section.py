"""[health] what follows steps that must not train the model, and other trouble of a rank."""

from typing import Literal

from pydantic import Field

from harness.config.sections import LIVE, Section


def _seconds() -> float | None:
    return Field(default=None, ge=0)


class TimeoutsConfig(Section):
    """[health.timeouts] after how many seconds without a sign of life a phase is a hang, which ends
    the run; 0: never. By default ten times the longest that it took in this run, at least 5
    minutes (for a save, an evaluation, an export and commands: 15), but less than run.timeout_s,
    which is also that of the first two times, since these may compile."""

    start: float | None = _seconds()
    """Until the first step, while the rank neither computes nor reads."""
    data: float | None = _seconds()
    """Waiting for a micro-batch."""
    forward: float | None = _seconds()
    """The task's feeder, with the forward."""
    backward: float | None = _seconds()
    """The backward, of one micro-batch."""
    step: float | None = _seconds()
    """The optimizer's step, and what ends a step."""
    save: float | None = _seconds()
    """Writing a checkpoint, or copying it for the background."""
    evaluation: float | None = _seconds()
    """One batch of an evaluation."""
    export: float | None = _seconds()
    """One tensor of an export, or writing its file."""
    commands: float | None = _seconds()
    """A live command, or an event."""
    end: float | None = _seconds()
    """After the last step, or an error."""


class HealthConfig(Section):
    """[health] what follows a loss or gradient that is not finite, a spike, or memory that ran
    out; and when a rank hangs."""

    nonfinite: Literal["skip", "stop", "rollback"] = Field(default="skip", json_schema_extra=LIVE)
    """After a step whose gradient is not finite on some rank, and which therefore changes nothing:
    "skip": the run continues; "stop": it saves and ends; "rollback": it returns to the last good
    checkpoint, and trains again without the samples of that step."""
    most_skipped: int = Field(default=10, ge=1, json_schema_extra=LIVE)
    """Steps that may be skipped in a row; after that many the run saves and ends. An fp16 overflow
    above the smallest loss scale does not count."""
    oom: Literal["stop", "shrink"] = "stop"
    """After a rank has run out of memory, which ends the run: "shrink": `harness run` halves
    `data.micro_batch_size` and doubles the gradient accumulation of the next start, which train in
    the same way."""
    timeouts: TimeoutsConfig = TimeoutsConfig()
    """When a phase is a hang (docs/watchdog.md)."""
    spike: Literal["report", "skip", "rollback"] = Field(default="report", json_schema_extra=LIVE)
    """After a step whose loss or gradient norm is far above the last 128: "report": it is logged;
    "skip": a step is skipped if its norm is; "rollback": as of `nonfinite`."""
    max_rollbacks: int = Field(default=3, ge=1, json_schema_extra=LIVE)
    """Rollbacks of a run; instead of one more, the run saves and ends."""
    blame: bool = Field(default=False, json_schema_extra=LIVE)
    """After a step that is not finite, find the first module whose output or gradient is not, by
    running the step's micro-batches again; every step keeps them until its end."""
