"""How much memory this rank uses."""

import time

import psutil
import torch

from harness import distributed

SECONDS_BETWEEN_SAMPLES = 1.0
"""The allocator's statistics take as long as a dozen kernels to launch."""


class MemoryMeter:
    """Samples the memory of this process and of its device, once a second at most."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._next = 0.0
        self.last: dict[str, int] = {}
        """The newest sample."""

    def sample(self) -> dict[str, int]:
        """Bytes, as `host_memory_bytes` (resident) and on a GPU `device_memory_bytes`,
        `device_memory_reserved_bytes` and `device_memory_peak_bytes`; empty if it is too early."""
        if (now := time.monotonic()) < self._next:
            return {}
        self._next = now + SECONDS_BETWEEN_SAMPLES
        found = {"host_memory_bytes": self._process.memory_info().rss}
        device = distributed.device()
        if device.type == "cuda":
            found["device_memory_bytes"] = torch.cuda.memory_allocated(device)
            found["device_memory_reserved_bytes"] = torch.cuda.memory_reserved(device)
            found["device_memory_peak_bytes"] = torch.cuda.max_memory_allocated(device)
        self.last = found
        return found
