"""Who this process is among the ranks, and what they say to each other.

world.py        joining and leaving the world; small collectives
network.py      on which network the nodes meet, and the error when a rank is lost
rng.py          the random generators of a rank
"""

from harness.distributed.world import (
    AsyncAllReduceMax,
    all_gather,
    all_reduce_max,
    barrier,
    broadcast,
    control_group,
    device,
    free_port,
    global_leader_only,
    global_rank,
    init,
    is_global_leader,
    is_local_leader,
    local_leader_only,
    local_rank,
    local_world_size,
    raise_on_all_ranks,
    seed_everything,
    shutdown,
    world_size,
)

__all__ = [
    "AsyncAllReduceMax",
    "all_gather",
    "all_reduce_max",
    "barrier",
    "broadcast",
    "control_group",
    "device",
    "free_port",
    "global_leader_only",
    "global_rank",
    "init",
    "is_global_leader",
    "is_local_leader",
    "local_leader_only",
    "local_rank",
    "local_world_size",
    "raise_on_all_ranks",
    "seed_everything",
    "shutdown",
    "world_size",
]
