"""The programs that started this rank, and whether they still live. Imports no torch."""

from functools import cache
from itertools import pairwise

import psutil

KINDS = (("deepspeed.launcher.launch", "torchrun", "torch.distributed.run"), ("deepspeed",))
"""Programs that a rank's parent may be, and that the parent's parent may be."""


@cache
def family() -> list[tuple[psutil.Process, int]]:
    """This rank and the launchers above it, each with its parent's number, as they are when first
    asked: the entry point asks at once.

    The parent is a launcher under torchrun and DeepSpeed; DeepSpeed's is itself the child of the
    command `deepspeed`. Any other parent, like a shell, may go.
    """
    chain = [psutil.Process()]
    for kinds in KINDS:
        try:
            parent = chain[-1].parent()
            words = parent.cmdline()[:4] if parent is not None else []
        except psutil.Error:
            break
        if parent is None or not any(word.rpartition("/")[2] in kinds for word in words):
            break
        chain.append(parent)
    return [(child, parent.pid) for child, parent in pairwise(chain)]


def is_abandoned() -> bool:
    """Whether a launcher has died and left this rank behind."""
    try:
        return any(child.ppid() != parent for child, parent in family())
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:  # it cannot be told here
        return False
