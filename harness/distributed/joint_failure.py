"""Whether all ranks fail in the same way, which is found out without a collective."""

import uuid
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import (
    DistError,  # pyright: ignore[reportPrivateImportUsage]
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
)

from harness.distributed.collectives import broadcast
from harness.distributed.world import global_rank, world_size


class JointFailure:
    """A place in the store of the process group where the ranks write how they fail.

    A rank that fails cannot call a collective: the others may be in another one.
    """

    def __init__(self) -> None:
        """Collective."""
        self._prefix = f"harness/joint_failure/{broadcast(uuid.uuid4().hex)}"

    def is_joint(self, how: str, timeout_s: float) -> bool:
        """Whether every rank calls this, with the same text and within `timeout_s`. Blocks."""
        if world_size() == 1:
            return True
        ranks = [str(rank) for rank in range(world_size())]
        try:
            store = PrefixStore(self._prefix, dist.distributed_c10d._get_default_store())
            store.set(str(global_rank()), how)
            store.wait(ranks, timedelta(seconds=timeout_s))
            return {store.get(rank) for rank in ranks} == {how.encode()}
        except DistError:  # not all in time, or the store is gone with its rank
            return False
