"""What an engine has done so far."""

from dataclasses import dataclass

from harness.health.skips import Reason


@dataclass
class Counters:
    """What an engine has done so far."""

    global_step: int = 0
    """Optimizer steps."""
    micro_step: int = 0
    """Micro-batches of each rank."""
    samples: int = 0
    """Samples over all ranks; exact between steps once the metrics have been drained."""
    tokens: int = 0
    """Tokens over all ranks, likewise."""
    skipped: int = 0
    """Optimizer steps that changed nothing: a gradient was not finite, or their norm a spike, or no
    rank had a term of the loss."""
    skipped_in_a_row: int = 0
    """The last ones, without those that find the loss scale of fp16."""

    def stepped(self, skipped: Reason | None) -> None:
        """Counts an optimizer step. `skipped`: why it was, if it was."""
        self.global_step += 1
        self.skipped += skipped is not None
        self.skipped_in_a_row += skipped is not None and skipped != "overflow"
        if skipped is None:
            self.skipped_in_a_row = 0
