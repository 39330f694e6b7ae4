"""What an engine has done so far."""

from dataclasses import dataclass


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
    """Optimizer steps that changed nothing, because gradients were not finite."""
