"""The launchers that started this rank, and whether they are still alive. Imports no torch."""

from functools import cache
from itertools import pairwise

import psutil

LAUNCHERS = (("deepspeed.launcher.launch", "torchrun", "torch.distributed.run"), ("deepspeed",))
"""Programs that a rank's parent may be, and that its parent's parent may be."""


@cache
def parent_ids() -> list[tuple[psutil.Process, int]]:
    """`(process, its parent's pid)` for this rank and its launcher, where the parent is a launcher.

    As found by the first call, which the entry point makes at once. The parent is a launcher under
    torchrun and DeepSpeed; DeepSpeed's is itself a child of the command `deepspeed`. Any other
    parent, like a shell, may end.
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
