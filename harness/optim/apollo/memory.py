"""Bytes of state that APOLLO keeps on each rank, computed from shapes."""

from collections.abc import Mapping, Sequence
from typing import Any

from harness.optim.apollo.channels import ChannelPlan, matrices_of
from harness.optim.sharded.layouts import expected_shards


def state_bytes(groups: Sequence[Mapping[str, Any]], stage: int, world: int) -> list[int]:
    """Bytes of optimizer state per rank for the groups that `apollo_param_groups` returns.

    Exact for DeepSpeed's default layout (at stage 3 except for the padding of several sub-groups).
    Parameters may be on the meta device.
    """
    total = [0] * world
    for group in groups:
        shapes = {
            name: tuple(parameter.shape)
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
        }
        matrices = {}
        if group["rank"]:
            for name, shape in shapes.items():
                matrices[name] = matrices_of(name, shape, group.get("stacked", False))
        for rank in range(world):
            for shard, elements in expected_shards(shapes, stage, world, rank):
                total[rank] += 4  # the step
                if not group["rank"]:
                    total[rank] += 2 * 4 * elements
                else:
                    plan = ChannelPlan([shard], matrices)
                    total[rank] += 2 * 4 * plan.rows * group["rank"] + 4 * len(plan.matrices)
                    if group.get("projection") == "svd":
                        rows = sum(size for _, size in plan.projection_rows.values())
                        total[rank] += 4 * rows * group["rank"]
    return total
