"""How much host memory a rank may use."""

import os
from pathlib import Path

import psutil


def available_host_memory() -> int:
    """Free bytes of the machine, or of its container, divided by the ranks that share it."""
    free = psutil.virtual_memory().available
    cgroup = Path("/sys/fs/cgroup")
    try:
        limit = int((cgroup / "memory.max").read_text())
        free = min(free, limit - int((cgroup / "memory.current").read_text()))
    except (OSError, ValueError):  # no container, or no limit
        pass
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    return max(0, free) // ranks
