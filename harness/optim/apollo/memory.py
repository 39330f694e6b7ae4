"""How much state APOLLO keeps on each rank, before anything is built.

python -m harness.optim.apollo.memory        # the table of docs/apollo.md
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import nn

from harness.optim.apollo.channels import ChannelPlan, matrices_of
from harness.optim.apollo.groups import apollo_param_groups
from harness.zero.partition import (
    end_to_end,
    partition_segments,
    partition_size,
    shard_segments,
    shards_numel,
    whole,
)
from harness.zero.shards import Shard

Shapes = Mapping[str, Sequence[int]]


def state_bytes(groups: Sequence[Mapping[str, Any]], stage: int, world: int) -> list[int]:
    """Bytes of optimizer state by rank, for the groups that `apollo_param_groups` makes.

    Exact for DeepSpeed's default layout (at stage 3 up to the padding of several sub-groups).
    Parameters may be on the meta device: nothing is allocated but an integer for every channel.
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
            for shard, elements in _shards(shapes, stage, world, rank):
                total[rank] += 4  # the step
                if not group["rank"]:
                    total[rank] += 2 * 4 * elements
                else:
                    plan = ChannelPlan([shard], matrices)
                    total[rank] += 2 * 4 * plan.rows * group["rank"] + 4 * len(plan.matrices)
                    if group.get("projection") == "svd":
                        rows = sum(size for _, size in plan.projected.values())
                        total[rank] += 4 * rows * group["rank"]
    return total


def _shards(shapes: Shapes, stage: int, world: int, rank: int) -> Iterator[tuple[Shard, int]]:
    """The tensors that a rank steps for one parameter group: their layout, and their elements."""
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    if stage == 0:
        for name, size in sizes.items():
            yield Shard(((whole(name=name, numel=size),),)), size
        return
    if stage == 3:
        by_rank = [shard_segments(sizes=sizes, world=world, rank=of) for of in range(world)]
        elements = shards_numel(sizes=sizes, world=world)
    else:
        places = end_to_end(sizes=sizes)
        elements = partition_size(numel=sum(sizes.values()), world=world)
        by_rank = [
            partition_segments(places=places, sizes=sizes, size=elements, rank=of)
            for of in range(world)
        ]
    yield Shard(tuple(map(tuple, by_rank)), rank), elements


def llama(width: int, hidden: int, layers: int, vocabulary: int = 32000) -> nn.Module:
    """The parameters of a LLaMA of the paper's sizes, without memory; not a model that runs."""

    def linear(inputs: int, outputs: int) -> nn.Module:
        return nn.Linear(inputs, outputs, bias=False)

    with torch.device("meta"):
        model = nn.ModuleDict({"embedding": nn.Embedding(vocabulary, width)})
        for layer in range(layers):
            block = nn.ModuleDict({n: linear(width, width) for n in ("q", "k", "v", "o")})
            block["gate"], block["up"] = linear(width, hidden), linear(width, hidden)
            block["down"] = linear(hidden, width)
            block["norms"] = nn.ModuleList([nn.RMSNorm(width), nn.RMSNorm(width)])
            model[f"layer{layer}"] = block
        model["norm"], model["lm_head"] = nn.RMSNorm(width), linear(width, vocabulary)
    return model


def main() -> None:
    """Prints the state of the fullest rank, in MiB."""
    sizes = {"130M": (768, 2048, 12), "1B": (2048, 5461, 24), "7B": (4096, 11008, 32)}
    layouts = {"1 rank": (0, 1), "ZeRO 1/2, 8 ranks": (1, 8), "ZeRO 3, 8 ranks": (3, 8)}
    rows = [
        "| model | layout | AdamW | APOLLO, r = width / 4 | APOLLO-Mini |",
        "|---|---|--:|--:|--:|",
    ]
    for name, size in sizes.items():
        model = llama(*size)
        dense = apollo_param_groups(model, rank=size[0] // 4)
        everything = [group | {"rank": 0} for group in dense]
        kinds = [everything, dense, apollo_param_groups(model, rank=1)]
        for layout, (stage, world) in layouts.items():
            found = [max(state_bytes(groups, stage, world)) / 2**20 for groups in kinds]
            rows.append(f"| {name} | {layout} | " + " | ".join(f"{x:,.0f}" for x in found) + " |")
    sys.stdout.write("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
