"""Where a run keeps its newest state in host memory (`checkpoint.in_memory_every`).

Files in /dev/shm outlive the processes that wrote them, and are lost with the node.
"""

import hashlib
import os
import shutil
from contextlib import suppress
from pathlib import Path

from harness.files import locked

SHARED = Path("/dev/shm")


def memory_directory(run_dir: Path) -> Path:
    """The directory of a run in this node's memory."""
    name = hashlib.sha256(str(run_dir.absolute()).encode()).hexdigest()[:16]
    return SHARED / f"harness-{os.getuid()}-{name}"


def remove_memory(run_dir: Path) -> None:
    """Frees what a run has in this node's memory, if anything."""
    shutil.rmtree(memory_directory(run_dir), ignore_errors=True)


def remove_unused_memory(run_dir: Path) -> None:
    """`remove_memory`, unless a run has the lock of the directory."""
    if (run_dir / "control").is_dir():
        with suppress(OSError), locked(run_dir / "control/lock"):
            remove_memory(run_dir)
