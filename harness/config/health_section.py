"""[health] what follows steps that must not train the model, and other trouble of a rank."""

from typing import Literal

from harness.config.sections import Section


class HealthConfig(Section):
    """[health] what follows a loss or gradient that is not finite, or a spike."""

    oom: Literal["stop", "shrink"] = "stop"
    """After a rank has run out of memory, which ends the run: "shrink": `harness run` halves
    `data.micro_batch_size` and doubles the gradient accumulation of the next start, which train in
    the same way."""
