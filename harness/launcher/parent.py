"""The launchers of this rank, and whether they are still alive. Does not import torch."""

from functools import cache
from itertools import pairwise

import psutil

LAUNCHERS = (("deepspeed.launcher.launch", "torchrun", "torch.distributed.run"), ("deepspeed",))
"""Programs that may be a rank's parent, and its grandparent."""


@cache
def parent_ids() -> list[tuple[psutil.Process, int]]:
    """`(process, its parent's pid)` for this rank and its launcher, if the parent is a launcher.

    The result of the first call, which the entry point makes at its start. The parent is a launcher
    under torchrun and DeepSpeed; DeepSpeed's is itself a child of the command `deepspeed`. Other
    parents, like a shell, may end.
    """
    chain = [psutil.Process()]
    for programs in LAUNCHERS:
        try:
            parent = chain[-1].parent()
            words = parent.cmdline()[:4] if parent is not None else []
        except psutil.Error:
            break
        if parent is None or not any(word.rpartition("/")[2] in programs for word in words):
            break
        chain.append(parent)
    return [(child, parent.pid) for child, parent in pairwise(chain)]


def is_orphaned() -> bool:
    """Whether a launcher of this rank has died."""
    try:
        return any(child.ppid() != parent for child, parent in parent_ids())
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:  # not known on this system
        return False
