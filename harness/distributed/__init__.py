"""Who this process is among the ranks, and what they say to each other.

world.py        joining and leaving the world; small collectives
network.py      on which network the nodes meet, and the error when a rank is lost
rng.py          the random generators of a rank
"""

from harness.distributed.world import (
    Agreement,
    agree,
    all_gather,
    barrier,
    broadcast,
    control_group,
    device,
    free_port,
    global_leader_only,
    global_rank,
    in_unison,
    init,
    is_global_leader,
    is_local_leader,
    local_leader_only,
    local_rank,
    local_world_size,
    seed_everything,
    shutdown,
    world_size,
)

__all__ = [
    "Agreement",
    "agree",
    "all_gather",
    "barrier",
    "broadcast",
    "control_group",
    "device",
    "free_port",
    "global_leader_only",
    "global_rank",
    "in_unison",
    "init",
    "is_global_leader",
    "is_local_leader",
    "local_leader_only",
    "local_rank",
    "local_world_size",
    "seed_everything",
    "shutdown",
    "world_size",
]
