"""Where an error has reached this rank: in which step and phase, with which samples."""

import socket
from dataclasses import dataclass
from typing import Protocol

from harness import distributed
from harness.data.fetch import MOST_SAMPLES
from harness.data.step_batches import StepBatches
from harness.distributed.network import is_lost_rank
from harness.errors import HarnessError, TaskError, first_few, is_on_all_ranks
from harness.health import phases


class Loop(Protocol):
    """The part of a `trainer.Trainer` that is used here."""

    batches: StepBatches

    @property
    def begun(self) -> object: ...


@dataclass(frozen=True)
class Place:
    """Where a rank was."""

    step: int
    """The step in progress; between steps the last one."""
    phase: phases.Phase
    samples: list[int] | None
    """Indices of the samples in the micro-batch in progress, if there is one and they are known."""

    def note(self, error: Exception) -> None:
        """Adds this place to an error that does not tell it; it is printed below its traceback."""
        tells_it = isinstance(error, HarnessError) and type(error) not in (HarnessError, TaskError)
        if tells_it or is_lost_rank(error):
            return
        words = [f"step {self.step}", f"phase {self.phase}"]
        if not is_on_all_ranks(error):
            words.insert(0, f"rank {distributed.global_rank()} on {socket.gethostname()}")
            if self.samples is not None:
                words.append(f"samples {first_few(self.samples, MOST_SAMPLES)}")
        error.add_note("in " + ", ".join(words))


def place_of(loop: Loop) -> Place:
    """Where the loop is; call it where an error is caught, before anything else is done."""
    doing = phases.now()
    has_batch = loop.begun is not None and doing.phase in ("forward", "backward", "step")
    return Place(doing.step, doing.phase, loop.batches.samples if has_batch else None)
