"""Bytes that APOLLO keeps and sends on each rank, computed from shapes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from harness.optim.apollo.channels import ChannelPlan, matrices_of
from harness.optim.sharded.layouts import expected_shards


def state_bytes(groups: Sequence[Mapping[str, Any]], stage: int, world: int) -> list[int]:
    """Bytes of optimizer state per rank for the groups that `apollo_param_groups` returns.

    Exact for DeepSpeed's default layout (at stage 3 except for the padding of several sub-groups).
    Parameters may be on the meta device.
    """
    total = [0] * world
    for rank in range(world):
        for group, plan, elements in _plans(groups, stage, world, rank):
            total[rank] += 4  # the step
            if plan is None:
                total[rank] += 2 * 4 * elements
            else:
                total[rank] += 2 * 4 * plan.rows * group["rank"] + 4 * len(plan.matrices)
                if group.get("projection") == "svd":
                    rows = sum(size for _, size in plan.projection_rows.values())
                    total[rank] += 4 * rows * group["rank"]
    return total


def sent_bytes(groups: Sequence[Mapping[str, Any]], stage: int, world: int) -> tuple[int, int]:
    """Bytes that each rank sends in a step, as rings send them: sketches of channels to their ranks
    (fp32), and their scales to all (fp64). Without the flag that says whether gradients are finite,
    and without what `projection = "svd"` exchanges at a refresh."""
    sketches = scales = 0
    for group, plan, _ in _plans(groups, stage, world, 0) if stage else ():
        if plan is not None:
            sketches += 4 * (world - 1) * plan.chunk * (group["rank"] + 1)
            if plan.is_cut:
                scales += 8 * (world - 1) * (plan.chunk + 3 * len(plan.matrices))
    return sketches, scales


def _plans(
    groups: Sequence[Mapping[str, Any]], stage: int, world: int, rank: int
) -> Iterator[tuple[Mapping[str, Any], ChannelPlan | None, int]]:
    """For each tensor that a rank steps: its group, its plan (None: dense) and its elements."""
    for group in groups:
        named = dict(zip(group["param_names"], group["params"], strict=True))
        shapes = {name: tuple(parameter.shape) for name, parameter in named.items()}
        matrices = {}
        if group["rank"]:
            for name, shape in shapes.items():
                matrices[name] = matrices_of(name, shape, group.get("stacked", False))
        for shard, elements in expected_shards(shapes, stage, world, rank):
            yield group, ChannelPlan([shard], matrices) if group["rank"] else None, elements
