"""[health] what follows steps that must not train the model, and other trouble of a rank."""

from typing import Literal

from pydantic import Field

from harness.config.sections import LIVE, Section


class HealthConfig(Section):
    """[health] what follows a loss or gradient that is not finite, or memory that ran out."""

    nonfinite: Literal["skip", "stop"] = Field(default="skip", json_schema_extra=LIVE)
    """After a step whose gradient is not finite on some rank, and which therefore changes nothing:
    "skip": the run continues; "stop": it saves and ends."""
    most_skipped: int = Field(default=10, ge=1, json_schema_extra=LIVE)
    """Steps that may be skipped in a row; after that many the run saves and ends. An fp16 overflow
    above the smallest loss scale does not count."""
    oom: Literal["stop", "shrink"] = "stop"
    """After a rank has run out of memory, which ends the run: "shrink": `harness run` halves
    `data.micro_batch_size` and doubles the gradient accumulation of the next start, which train in
    the same way."""
