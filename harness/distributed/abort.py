"""Aborts the collectives of this rank: what waits in one would else wait for its timeout."""

import os
import socket
from contextlib import suppress

import torch.distributed as dist

from harness.distributed.forks import open_descriptors
from harness.distributed.world import device


def abort_collectives() -> None:
    """Makes this rank's collectives fail at once, pending ones and later ones; from any thread.

    NCCL's communicators are aborted. gloo cannot abort what waits, so its sockets are shut down.
    The other ranks' collectives with this one fail as well.
    """
    if device().type == "cuda" and dist.is_initialized():
        dist.distributed_c10d._abort_process_group()
    shut_sockets()


def shut_sockets() -> None:
    """Of gloo: what waits for a message fails, on this rank and on the other one."""
    store = int(os.environ["MASTER_PORT"])  # its connections are needed to find out what happened
    for descriptor in open_descriptors():
        with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as shared:
            if shared.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            if store not in (shared.getsockname()[1], shared.getpeername()[1]):
                shared.shutdown(socket.SHUT_RDWR)
