"""Where DeepSpeed's own checkpoint files keep what belongs to a parameter, at every ZeRO stage.

An optimizer steps *flat* tensors: at stage 0 whole parameters, above it one shard per rank of each
parameter group (stages 1 and 2: runtime/zero/stage_1_and_2.py) or sub-group (stage 3:
runtime/zero/stage3.py). A flat has a fp32 master and the optimizer's state of the same size; a
`Segment` says which stretch of a parameter lies where in it. Pure reading: files are mapped into
memory, and only what is asked for is read from them.
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from harness.checkpoint.manifest import digest
from harness.errors import CheckpointError

PARAMETER_NAMES = "parameter_names"
"""Key of a model file: names by parameter group, in the optimizer's order. Stage 0 tells none."""

Tree = dict[str, Any]
Shapes = dict[str, torch.Size]


@dataclass(frozen=True)
class Segment:
    """A stretch of a flattened parameter, and its place in a flat; counted in elements."""

    name: str
    start: int
    offset: int
    length: int


@dataclass
class Flat:
    """A tensor that the optimizer steps: its fp32 master, and the state of the same shape."""

    group: int
    """The parameter group that it belongs to."""
    segments: list[Segment]
    """One for every parameter of the whole flat, also for those with no element on this rank."""
    master: torch.Tensor
    """Padded at stage 3; at stages 1 and 2 without the padding at the end."""
    padding: int
    """Elements that `master` lacks, and the moments have."""
    state: Tree = field(default_factory=dict)

    @property
    def shape(self) -> torch.Size:
        """The shape of the moments: the parameter's own at stage 0, (elements,) above it."""
        if not self.padding:
            return self.master.shape
        return torch.Size([self.master.numel() + self.padding])


def base_state(optimizer: Tree) -> Tree:
    """The state dict of the torch optimizer below DeepSpeed's one.

    Raises CheckpointError for an "elastic" checkpoint.
    """
    for key in ("base_optimizer_state", "optimizer_state_dict"):
        if key in optimizer:
            optimizer = optimizer[key]
            break
    if not isinstance(optimizer, dict):
        raise CheckpointError("zero_optimization.elastic_checkpoint: this layout cannot be read")
    return optimizer


def flats(optimizer: Tree, module: Tree, shapes: list[Shapes], rank: int, world: int) -> list[Flat]:
    """The flats of one rank, in the order of the optimizer's own numbering.

    `optimizer`: what DeepSpeed's optimizer gives as its state dict. `module`: of the model, used at
    fp32 stage 0, where the parameters are their own masters. `shapes`: of the parameters by name,
    for each (sub-)group in the optimizer's order. Raises CheckpointError if the state is elsewhere
    (NVMe), or in another layout.
    """
    base = base_state(optimizer)
    groups = [k for k, group in enumerate(base["param_groups"]) for _ in group["params"]]
    if "single_partition_of_fp32_groups" in optimizer:
        found = list(_partitions(optimizer, shapes, rank))
    elif "fp32_flat_groups" in optimizer:
        found = list(_sub_groups(optimizer, shapes, rank, world))
    elif "fp32_groups_flat" in optimizer:
        found = list(_whole_groups(optimizer, shapes))
    else:
        names = [name for group in shapes for name in group]
        masters = [p for g in optimizer.get("fp32_groups", []) for p in g]
        masters = masters or [module[name] for name in names]
        found = [
            (master, 0, [Segment(name, 0, 0, master.numel())])
            for name, master in zip(names, masters, strict=True)
        ]
    return [
        Flat(group, segments, master, padding, base["state"].get(number, {}))
        for number, (group, (master, padding, segments)) in enumerate(
            zip(groups, found, strict=True)
        )
    ]


_Found = Iterator[tuple[torch.Tensor, int, list[Segment]]]


def _partitions(optimizer: Tree, shapes: list[Shapes], rank: int) -> _Found:
    """Stages 1 and 2: a group is one long tensor, cut into equal partitions."""
    alignment = optimizer.get("param_alignment_paddings", [[0] * len(group) for group in shapes])
    masters, paddings = optimizer["single_partition_of_fp32_groups"], optimizer["group_paddings"]
    if "param_alignment_paddings" not in optimizer:  # BF16_Optimizer does not trim its masters
        masters = [m[: m.numel() - gap] for m, gap in zip(masters, paddings, strict=True)]
    for group, gaps, master, padding in zip(shapes, alignment, masters, paddings, strict=True):
        size = master.numel() + padding
        first, segments = 0, []
        for (name, shape), gap in zip(group.items(), gaps, strict=True):
            start = min(max(rank * size - first, 0), shape.numel())
            stop = min(max((rank + 1) * size - first, 0), shape.numel())
            segments.append(Segment(name, start, first + start - rank * size, stop - start))
            first += shape.numel() + gap
        yield master, padding, segments


def _sub_groups(optimizer: Tree, shapes: list[Shapes], rank: int, world: int) -> _Found:
    """Stage 3: every parameter is cut into equal shards, and those lie one after the other."""
    for group, master in zip(shapes, optimizer["fp32_flat_groups"], strict=True):
        offset, segments = 0, []
        for name, shape in group.items():
            shard = math.ceil(shape.numel() / world)
            start = min(rank * shard, shape.numel())
            length = min(shard, shape.numel() - start)
            segments.append(Segment(name, start, offset, length))
            offset += shard
        if master.numel() != offset:
            raise CheckpointError(
                f"the state of {segments[0].name!r} has {master.numel()} elements here, expected "
                f"{offset}: on NVMe, or cut by MiCS? This layout cannot be read"
            )
        yield master, 0, segments


def _whole_groups(optimizer: Tree, shapes: list[Shapes]) -> _Found:
    """FusedAdam at stage 0: a group is one tensor of whole parameters."""
    for group, master in zip(shapes, optimizer["fp32_groups_flat"], strict=True):
        offset, segments = 0, []
        for name, shape in group.items():
            segments.append(Segment(name, 0, offset, shape.numel()))
            offset += shape.numel()
        yield master, 0, segments


def layout(trees: Collection[Tree]) -> str:
    """A digest of where rank 0's trees of an engine keep what: equal if one may be loaded as other.

    Rank 0's flats give every parameter its place and the partitions their size; with the number of
    partitions they speak for all ranks. What is digested is found, not listed: whatever setting of
    DeepSpeed, or order of the parameters, moves anything, changes the digest.
    """
    model = next(tree for tree in trees if "module" in tree)
    optimizer = model["optimizer"]
    if optimizer is None:
        (optimizer,) = (tree["optimizer_state_dict"] for tree in trees if tree is not model)
    shapes, world = group_shapes(model), model["dp_world_size"]
    places = [
        (flat.group, flat.shape, flat.segments)
        for flat in flats(optimizer, model["module"], shapes, 0, world)
    ]
    return digest(repr((sorted(optimizer), optimizer.get("partition_count"), places)))


def group_shapes(model: Tree) -> list[Shapes]:
    """The shapes of the parameters by name, for each (sub-)group in the optimizer's order.

    `model`: rank 0's tree of model_states. Raises CheckpointError if it does not tell the names.
    """
    if model["param_shapes"] is not None:
        return model["param_shapes"]
    if PARAMETER_NAMES not in model:
        raise CheckpointError("saved at ZeRO 0 before names were recorded")
    groups = [{n: model["module"][n].shape for n in names} for names in model[PARAMETER_NAMES]]
    if "fp32_groups" in model["optimizer"]:  # this wrapper leaves out what has no element
        groups = [{n: s for n, s in group.items() if s.numel()} for group in groups]
    return groups


class SavedEngine:
    """One engine's files, `step-N/ENGINE/`, opened: everything by parameter name.

    `model` is rank 0's tree of model_states; `shapes` those of the parameters that the optimizer
    steps; `groups` its parameter groups without their parameters; `flats` those of every rank (at
    stage 0 of one), in the order of the optimizer's own numbering.
    """

    def __init__(self, directory: Path):
        """Raises CheckpointError if the layout is not one of those in the module's docstring."""
        self.directory = directory
        models = _load_ranks(directory, "model_states")
        shards = _load_ranks(directory, "optim_states")
        optimizers = [tree["optimizer_state_dict"] for tree in shards]
        self.model: Tree = models[0]
        self.world_size: int = self.model["dp_world_size"]
        self.stage = int(optimizers[0].get("zero_stage", 1)) if optimizers else 0
        if any(directory.glob("zero_pp_rank_*_model_states.pt")):
            self.stage = 3
        self._fragments = [model["frozen_param_fragments"] for model in models]
        if self.model["optimizer"] is not None:
            optimizers = [self.model["optimizer"]]
        self.optimizer: Tree | None = optimizers[0] if optimizers else None
        self.groups: list[Tree] = []
        self.flats: list[list[Flat]] = []
        self.shapes: Shapes = {}
        self._pieces: dict[str, list[tuple[Segment, Flat]]] = {}
        if self.optimizer is None:
            return
        if self.stage and len(optimizers) != self.world_size:
            found = f"{len(optimizers)} of {self.world_size} ranks"
            raise CheckpointError(f"{directory}: optimizer states of {found}")
        for group in base_state(self.optimizer)["param_groups"]:
            self.groups.append({key: value for key, value in group.items() if key != "params"})
        shapes = group_shapes(self.model)
        for group in shapes:
            self.shapes |= group
        for rank, optimizer in enumerate(optimizers):
            found = flats(optimizer, self.model["module"], shapes, rank, self.world_size)
            self.flats.append(found)
            for flat in found:
                for segment in flat.segments:
                    self._pieces.setdefault(segment.name, []).append((segment, flat))

    def group_of(self, name: str) -> int:
        """The parameter group of a parameter."""
        return self._pieces[name][0][1].group

    def state_keys(self, name: str) -> list[str]:
        """The keys of the state that has the parameter's size (`exp_avg`, ...)."""
        state = self._pieces[name][0][1].state
        return [key for key, value in state.items() if _is_moment(value)]

    def scalars(self, name: str) -> Tree:
        """The rest of a parameter's state (`step`, ...): plain values, or tensors of shape ()."""
        state = next((f.state for s, f in self._pieces[name] if s.length), {})
        return {key: value for key, value in state.items() if not _is_moment(value)}

    def read(self, name: str, key: str | None, start: int, stop: int) -> torch.Tensor:
        """Elements `start` to `stop` of a flattened master (key None) or moment: (elements,)."""
        parts = []
        for segment, flat in self._pieces[name]:
            first = max(start, segment.start)
            last = min(stop, segment.start + segment.length)
            if first < last:
                if key is not None:
                    _check(flat, key)
                whole = (flat.master if key is None else flat.state[key]).detach()
                at = segment.offset - segment.start
                parts.append(whole.reshape(-1)[at + first : at + last])
        return torch.cat(parts) if parts else torch.empty(0)

    def master(self, name: str) -> torch.Tensor:
        """A parameter's whole fp32 master, in its shape."""
        shape = self.shapes[name]
        return self.read(name, None, 0, shape.numel()).reshape(shape)

    def moment(self, name: str, key: str) -> torch.Tensor:
        """A parameter's whole optimizer state of its size, in its shape."""
        shape = self.shapes[name]
        return self.read(name, key, 0, shape.numel()).reshape(shape)

    def weight(self, name: str) -> torch.Tensor:
        """An entry of the model's state dict, whole and in the dtype that the model computes in."""
        tensor = self.model["module"][name]
        if self.stage < 3 or name in self.model["buffer_names"]:
            return tensor
        name = self.model["shared_params"].get(name, name)
        if name in self.shapes:
            return self.master(name).to(tensor.dtype)
        shape = self.model["frozen_param_shapes"][name]
        shards = [fragments[name].reshape(-1) for fragments in self._fragments]
        return torch.cat(shards)[: shape.numel()].reshape(shape)

    def loss_scale(self) -> Tree:
        """What an fp16 engine's loss scaler has come to; {} at fp32 stage 0."""
        found = self.optimizer or {}
        if "loss_scaler" in found:
            found = vars(found["loss_scaler"])
        keys = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
        return {key: found[key] for key in keys if key in found}


def _is_moment(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _check(flat: Flat, key: str) -> None:
    if (found := flat.state[key].shape) != flat.shape:
        raise CheckpointError(
            f"optimizer state {key!r} of parameter {flat.segments[0].name!r} has the shape "
            f"{tuple(found)}, and the parameter {tuple(flat.shape)}: it cannot be cut for another "
            "number of ranks or ZeRO stage"
        )


class _Record:
    """Stands in for DeepSpeed's classes: what they hold, as plain attributes."""

    def __init__(self, *values: Any):
        self.values = values

    def __int__(self) -> int:
        return self.values[0]


_STANDINS = {
    f"deepspeed.{name}": type(name.rpartition(".")[2], (_Record,), {})
    for name in (
        "runtime.fp16.loss_scaler.LossScaler",
        "runtime.fp16.loss_scaler.DynamicLossScaler",
        "runtime.zero.config.ZeroStageEnum",
        "utils.tensor_fragment.fragment_address",
    )
}


def _load_ranks(directory: Path, kind: str) -> list[Tree]:
    """The trees of `*_{kind}.pt` by rank, mapped into memory; no pickled code is run."""
    paths = list(directory.glob(f"*mp_rank_00_{kind}.pt"))
    paths.sort(key=lambda path: int(path.name.partition("pp_rank_")[2].partition("_")[0] or 0))
    standins: list[Any] = [(standin, name) for name, standin in _STANDINS.items()]
    with torch.serialization.safe_globals(standins):
        return [torch.load(p, map_location="cpu", mmap=True, weights_only=True) for p in paths]
