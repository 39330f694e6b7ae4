"""Where an error has reached this rank: in which step and phase, with which samples."""

import socket
import traceback
from dataclasses import dataclass
from typing import Protocol

from harness import distributed
from harness.data.loader import MOST_SAMPLES
from harness.data.step_batches import StepBatches
from harness.distributed.network import is_lost_rank
from harness.engine.engines import Engines
from harness.errors import HarnessError, TaskError, first_few, is_on_all_ranks

PHASES = {
    "Trainer.save": "save",
    "Trainer.finish_save": "save",
    "Trainer.export": "export",
    "Trainer.evaluate": "evaluation",
    "Trainer.execute": "command",
    "StepBatches.prefetch": "data",
    "StepBatches._read": "data",
    "feed": "forward",
    "Engine.backward": "backward",
    "Engine.step": "optimizer's step",
}
"""By functions of the loop, as in tracebacks."""


class Loop(Protocol):
    """The part of a `trainer.Trainer` that is used here."""

    engines: Engines
    batches: StepBatches
    begun: object


@dataclass(frozen=True)
class Place:
    """Where a rank was."""

    step: int
    """The step in progress; between steps the last one."""
    phase: str | None
    samples: list[int] | None
    """Indices of the samples in the micro-batch in progress, if there is one and they are known."""

    def note(self, error: Exception) -> None:
        """Adds this place to an error that does not tell it; it is printed below its traceback."""
        tells_it = isinstance(error, HarnessError) and type(error) not in (HarnessError, TaskError)
        if tells_it or is_lost_rank(error):
            return
        words = [f"step {self.step}"]
        if not is_on_all_ranks(error):
            words.insert(0, f"rank {distributed.global_rank()} on {socket.gethostname()}")
        if self.phase:
            words.append(self.phase)
        if self.samples is not None and not is_on_all_ranks(error):
            words.append(f"samples {first_few(self.samples, MOST_SAMPLES)}")
        error.add_note("in " + ", ".join(words))


def place_of(loop: Loop, error: Exception) -> Place:
    """Where the loop was when it raised the error."""
    is_in_step = loop.begun is not None
    phase = next(filter(None, map(_phase, traceback.walk_tb(error.__traceback__))), None)
    is_batch = is_in_step and phase in ("forward", "backward", "optimizer's step")
    samples = loop.batches.samples if is_batch else None
    return Place(loop.engines.global_step + is_in_step, phase, samples)


def _phase(place: tuple[object, int]) -> str | None:
    frame, _ = place
    code = frame.f_code  # type: ignore[attr-defined]
    is_ours = frame.f_globals["__name__"].startswith("harness.")  # type: ignore[attr-defined]
    return PHASES.get(code.co_qualname) if is_ours else None
