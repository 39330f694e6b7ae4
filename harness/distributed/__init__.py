"""Who this process is among the ranks, and the small messages between them.

Its files, from the top down:

    joining.py         joining and leaving the world
    step_vector.py     the one vector that the ranks sum in each step
    rank_numbers.py    in such a vector, a few numbers of each rank
    failures.py        how ranks fail, told to each other; the error when a rank is lost
    failure.py         how a rank fails or is lost, in words
    shared_numbers.py  what each rank has noted down, even if it has died
    meeting.py         what ranks tell through the store, without a collective
    tensors.py         rank 0's tensors on every rank
    collectives.py     all-reduce, broadcast, gather; raising on all ranks together
    background.py      all-reduces that training does not wait for
    tree.py            values up a tree of the ranks, and down again
    peers.py           where the other ranks run
    abort.py           aborts the collectives of this rank
    rng.py             the random generators of a rank
    world.py           ranks and devices, and the group for small messages
    rendezvous.py      where the ranks of a launcher meet, also for a second run
    network.py         which interface gloo uses, and what its errors mean
    forks.py           what a forked process must not keep of its rank
"""

from harness.distributed.collectives import (
    AsyncAllReduceMax,
    all_gather,
    all_reduce,
    all_reduce_max,
    all_reduce_sum,
    barrier,
    broadcast,
    first_rank,
    gather,
    raise_on_all_ranks,
    reduce,
)
from harness.distributed.joining import init, shutdown
from harness.distributed.rng import seed_everything
from harness.distributed.step_vector import StepVector
from harness.distributed.world import (
    control_group,
    device,
    free_port,
    global_leader_only,
    global_rank,
    is_global_leader,
    local_rank,
    local_world_size,
    use_device,
    world_size,
)

__all__ = [
    "AsyncAllReduceMax",
    "StepVector",
    "all_gather",
    "all_reduce",
    "all_reduce_max",
    "all_reduce_sum",
    "barrier",
    "broadcast",
    "control_group",
    "device",
    "first_rank",
    "free_port",
    "gather",
    "global_leader_only",
    "global_rank",
    "init",
    "is_global_leader",
    "local_rank",
    "local_world_size",
    "raise_on_all_ranks",
    "reduce",
    "seed_everything",
    "shutdown",
    "use_device",
    "world_size",
]
