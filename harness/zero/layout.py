"""Where DeepSpeed's own checkpoint files keep what belongs to a parameter, at every ZeRO stage.

An optimizer steps *flat* tensors: at stage 0 complete parameters, above it one shard per rank of
each parameter group (stages 1 and 2: runtime/zero/stage_1_and_2.py) or sub-group (stage 3:
runtime/zero/stage3.py). A flat has a fp32 master and the optimizer's state of the same size; a
`Segment` says which stretch of a parameter is where in it. Only the sizes of tensors are needed:
live tensors of a running engine will do, and references into files (`formats.pt_reader.TensorRef`).
"""

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.errors import CheckpointError
from harness.zero.partition import (
    Segment,
    full_segment,
    full_segments,
    offsets_end_to_end,
    partition_segments,
    shard_segments,
    shards_numel,
)

PARAMETER_NAMES = "parameter_names"
"""Key of a model file: names by parameter group, in the optimizer's order. Plain DeepSpeed writes
none at stage 0."""

EMA = "ema"
"""Key of the EMA of the weights in the optimizer's state of a parameter (`engine.ema`)."""

Tree = dict[str, Any]

Shapes = Mapping[str, Any]
"""Sizes by the parameter's name: torch.Size or `formats.pt_reader.Shape`."""


@dataclass
class Flat:
    """A tensor that the optimizer steps: its fp32 master, and the state of the same shape."""

    group: int
    """Number of its parameter group."""
    segments: list[Segment]
    """One for every parameter of the flat on any rank, even if this rank has no element of it."""
    master: Any
    """A tensor or a `TensorRef`. At stages 1 and 2 it may lack the padding at the end."""
    size: int
    """Elements of the moments, all padding included."""
    padding: int
    """Elements at the end that belong to no parameter, and that DeepSpeed does not save; 0 at
    stages 0 and 3."""
    state: Tree = field(default_factory=dict)

    @property
    def shape(self) -> Any:
        """The shape of the moments: the parameter's own at stage 0, (elements,) above it."""
        shape = self.master.shape
        return shape if shape.numel() == self.size else type(shape)([self.size])


def base_state(optimizer: Tree) -> Tree:
    """The state dict of the torch optimizer inside DeepSpeed's.

    Raises CheckpointError for an "elastic" checkpoint.
    """
    for key in ("base_optimizer_state", "optimizer_state_dict"):
        if key in optimizer:
            optimizer = optimizer[key]
            break
    if not isinstance(optimizer, dict):
        raise CheckpointError("zero_optimization.elastic_checkpoint: this layout is not supported")
    return optimizer


def flats(optimizer: Tree, module: Tree, shapes: list[Shapes], rank: int, world: int) -> list[Flat]:
    """The flats of one rank, in the order of the optimizer's own numbering.

    `optimizer`: the state dict of DeepSpeed's optimizer. `module`: that of the model, used at fp32
    stage 0, where the parameters are their own masters. `shapes`: of the parameters by name,
    for each (sub-)group in the optimizer's order. Raises CheckpointError if the state is elsewhere
    (NVMe), or in another layout.
    """
    base = base_state(optimizer)
    groups = [k for k, group in enumerate(base["param_groups"]) for _ in group["params"]]
    if "single_partition_of_fp32_groups" in optimizer:
        located = list(_partitions(optimizer, shapes, rank, world))
    elif "fp32_flat_groups" in optimizer:
        located = list(_sub_groups(optimizer, shapes, rank, world))
    elif "fp32_groups_flat" in optimizer:
        located = list(_full_groups(optimizer, shapes))
    else:
        names = [name for group in shapes for name in group]
        masters = [p for g in optimizer.get("fp32_groups", []) for p in g]
        masters = masters or [module[name] for name in names]
        located = [
            (master, master.numel(), 0, [full_segment(name=name, numel=master.numel())])
            for name, master in _pairs(names, masters)
        ]
    return [
        Flat(group, segments, master, size, padding, base["state"].get(number, {}))
        for number, (group, (master, size, padding, segments)) in enumerate(_pairs(groups, located))
    ]


def _pairs(*lists: Any) -> Iterator[Any]:
    """`zip` that raises CheckpointError if the lists differ in length."""
    if len({len(list_) for list_ in lists}) > 1:
        raise _mismatch()
    return zip(*lists, strict=True)


def _mismatch() -> CheckpointError:
    return CheckpointError("its parameter groups do not match its tensors")


_Located = Iterator[tuple[Any, int, int, list[Segment]]]


def _partitions(optimizer: Tree, shapes: list[Shapes], rank: int, world: int) -> _Located:
    """Stages 1 and 2: a group is one long tensor, cut into equal partitions."""
    alignment = optimizer.get("param_alignment_paddings", [[0] * len(group) for group in shapes])
    masters = optimizer["single_partition_of_fp32_groups"]
    counts = _of_groups(optimizer["partition_count"], shapes)
    groups = base_state(optimizer)["param_groups"]
    for number, (group, gaps, master, count, settings) in enumerate(
        _pairs(shapes, alignment, masters, counts, groups)
    ):
        partition = rank
        if settings.get("moe"):
            group, partition = _experts(group, rank, world // count)
        if len(gaps) != len(group):
            raise _mismatch()
        sizes = {name: shape.numel() for name, shape in group.items()}
        padding = _unsaved_padding(optimizer, number, sum(sizes.values()), partition, count)
        size = master.numel() + padding
        offsets = offsets_end_to_end(sizes=sizes, gaps=gaps)
        segments = partition_segments(offsets=offsets, sizes=sizes, size=size, rank=partition)
        yield master, size, padding, segments


def _of_groups(value: Any, shapes: list[Shapes]) -> list[Any]:
    """One value per group, of a setting that DeepSpeed before 0.5 has once for all groups."""
    return value if isinstance(value, list) else [value] * len(shapes)


def _unsaved_padding(optimizer: Tree, group: int, numel: int, partition: int, count: int) -> int:
    """Elements at the end of a partition that DeepSpeed does not save of its master.

    Stages 1 and 2, which write `zero_stage`, omit what makes a group divisible by the number of
    partitions; BF16_Optimizer, which does not, saves all. `group_paddings` is not in files of
    DeepSpeed before 0.7. `numel`: of the group; only its last partition has padding.
    """
    if "zero_stage" not in optimizer:
        return 0
    if "group_paddings" in optimizer:
        return optimizer["group_paddings"][group]
    return -numel % count if partition == count - 1 else 0


_EXPERT = re.compile(r"(?P<before>.*\.deepspeed_experts\.)(?P<number>\d+)(?P<after>\..*)")


def _experts(group: Shapes, rank: int, parallel: int) -> tuple[Shapes, int]:
    """A group of experts under their global numbers, and which of its partitions a rank has.

    `parallel` neighbouring ranks each have different experts, which they number from 0 on; ranks
    that have the same experts share their state (deepspeed/utils/groups.py).
    """
    matches = {name: _EXPERT.fullmatch(name) for name in group}
    local = max((int(m["number"]) + 1 for m in matches.values() if m), default=0)
    named = {
        f"{m['before']}{rank % parallel * local + int(m['number'])}{m['after']}"
        if m
        else name: size
        for (name, size), m in zip(group.items(), matches.values(), strict=True)
    }
    return named, rank // parallel


def _sub_groups(optimizer: Tree, shapes: list[Shapes], rank: int, world: int) -> _Located:
    """Stage 3: every parameter is cut into equal shards, and a rank's shards are end to end."""
    for group, master in _pairs(shapes, optimizer["fp32_flat_groups"]):
        sizes = {name: shape.numel() for name, shape in group.items()}
        expected = shards_numel(sizes=sizes, world=world)
        if master.numel() != expected:
            raise CheckpointError(
                f"the sub-group of {next(iter(group))!r} has {master.numel()} elements, expected "
                f"{expected}: state on NVMe and MiCS shards are not supported"
            )
        yield master, expected, 0, shard_segments(sizes=sizes, world=world, rank=rank)


def _full_groups(optimizer: Tree, shapes: list[Shapes]) -> _Located:
    """FusedAdam at stage 0: a group is one tensor of complete parameters."""
    for group, master in _pairs(shapes, optimizer["fp32_groups_flat"]):
        sizes = {name: shape.numel() for name, shape in group.items()}
        yield master, sum(sizes.values()), 0, full_segments(sizes=sizes)


def layout_digest(trees: Collection[Tree]) -> str:
    """A digest of where rank 0's trees of an engine keep what; trees with equal digests are
    interchangeable.

    Rank 0's flats fix every parameter's offset and the partitions' size; with the number of
    partitions they determine all ranks. The layout itself is digested, not a list of settings: any
    setting of DeepSpeed, or order of the parameters, that moves something changes the digest.
    """
    model = next(tree for tree in trees if "module" in tree)
    optimizer = model["optimizer"]
    if optimizer is None:
        (optimizer,) = (tree["optimizer_state_dict"] for tree in trees if tree is not model)
    shapes, world = group_shapes(model), model["dp_world_size"]
    located = [
        (flat.group, flat.shape, flat.segments)
        for flat in flats(optimizer, model["module"], shapes, 0, world)
    ]
    layout = repr((sorted(optimizer), optimizer.get("partition_count"), located))
    return hashlib.sha256(layout.encode()).hexdigest()


def group_shapes(model: Tree) -> list[Shapes]:
    """The shapes of the parameters by name, for each (sub-)group in the optimizer's order.

    `model`: rank 0's tree of model_states. Raises CheckpointError if it does not have the names.
    """
    shapes = model["param_shapes"]
    if shapes is not None:
        return [shapes] if isinstance(shapes, dict) else shapes  # of all groups, before 0.5.4
    if PARAMETER_NAMES not in model:
        raise CheckpointError("saved at ZeRO 0 before names were recorded")
    groups: list[Shapes] = [
        {n: model["module"][n].shape for n in names} for names in model[PARAMETER_NAMES]
    ]
    if "fp32_groups" in model["optimizer"]:  # this wrapper omits empty parameters
        groups = [{n: s for n, s in group.items() if s.numel()} for group in groups]
    return groups
