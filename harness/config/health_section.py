"""[health] what follows steps that must not train the model, and other trouble of a rank."""

from typing import Literal

from pydantic import Field

from harness.config.sections import LIVE, Section


class HealthConfig(Section):
    """[health] what follows a loss or gradient that is not finite, or a spike."""

    nonfinite: Literal["skip", "stop", "rollback"] = Field(default="skip", json_schema_extra=LIVE)
    """After a step whose gradient is not finite on some rank, and which therefore changes nothing:
    "skip": the run continues; "stop": it saves and ends; "rollback": it returns to the last good
    checkpoint, and trains again without the samples of that step."""
    most_skipped: int = Field(default=10, ge=1, json_schema_extra=LIVE)
    """Steps that may be skipped in a row; after that many the run saves and ends. An fp16 overflow
    above the smallest loss scale does not count."""
    spike: Literal["report", "skip", "rollback"] = Field(default="report", json_schema_extra=LIVE)
    """After a step whose loss or gradient norm is far above the last 128: "report": it is logged;
    "skip": a step is skipped if its norm is; "rollback": as of `nonfinite`."""
    max_rollbacks: int = Field(default=3, ge=1, json_schema_extra=LIVE)
    """Rollbacks of a run; instead of one more, the run saves and ends."""
    blame: bool = Field(default=False, json_schema_extra=LIVE)
    """After a step that is not finite, find the first module whose output or gradient is not, by
    running the step's micro-batches again; every step keeps them until its end."""
