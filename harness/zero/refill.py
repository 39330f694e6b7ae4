"""Fills the trees of a new layout with what an engine saved in another one.

DeepSpeed's own trees say where everything belongs in the new layout; the old files are read by
parameter name (reader.py). Tensors are read on the CPU, on each rank only its own segments.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from harness.errors import CheckpointError
from harness.formats.tensor_file import is_extra_state
from harness.io.stored import materialize, read_tensor
from harness.zero.layout import EMA, Flat, Shapes, Tree, base_state, flats
from harness.zero.partition import shard_range
from harness.zero.reader import SavedEngine

# Keys of model_states with the same value in every layout.
_COPIED = ("lr_scheduler", "global_steps", "global_samples", "skipped_steps")
# Of the settings of a parameter group.
_OF_LAYOUT = ("params", "param_names")
# Good for the contiguous shards of ZeRO 1 to 3 alone: see optim/build.py.
_NOT_AT_STAGE_0 = ("fused",)

FlatsOf = Callable[[int], list[Flat]]
"""The flats of a rank in the new layout, with the masters of the new engine."""


@dataclass(frozen=True)
class TreeFiller:
    """Fills one rank's trees of a new layout with an engine's saved state."""

    saved: SavedEngine
    shapes: list[Shapes]
    """Of the new layout: see `layout.group_shapes`."""
    stage: int
    rank: int
    world: int
    states: Callable[[FlatsOf, list[Tree]], dict[int, Tree]]
    """The optimizer's state of every flat of this rank, by its number. Given the settings of the
    parameter groups."""
    may_lack: bool = False
    """Whether entries that were not saved stay as they are in the new engine."""

    def fill(self, tree: Tree) -> Tree:
        """The tree, one of model_states or optim_states, with the saved state. Raises
        CheckpointError."""
        if "module" in tree:
            return self._model(tree)
        return tree | {"optimizer_state_dict": self._optimizer(tree["optimizer_state_dict"], {})}

    def _model(self, tree: Tree) -> Tree:
        """A tree of model_states, filled."""
        saved, is_sharded = self.saved, self.stage == 3
        module = type(tree["module"])()
        complete = cache(partial(weight_of, saved))  # tied ones are read once
        for name, value in tree["module"].items():
            if self.may_lack and name not in saved.extra and name not in saved.sources:
                module[name] = value
            elif is_extra_state(name):
                module[name] = materialize(saved.extra[name])
            elif is_sharded and not saved.is_buffer(name):
                module[name] = value  # a placeholder
            else:
                module[name] = complete(saved.source(name))
        filled: Tree = {key: materialize(saved.model[key]) for key in _COPIED}
        filled["module"] = module
        if tree["frozen_param_fragments"] is not None:
            filled["frozen_param_fragments"] = {
                name: self._frozen(name, fragment)
                for name, fragment in tree["frozen_param_fragments"].items()
            }
        if tree["optimizer"] is not None:
            filled["optimizer"] = self._optimizer(tree["optimizer"], module)
        return tree | filled

    def _frozen(self, name: str, fragment: Tensor) -> Tensor:
        """A frozen parameter, or at stage 3 this rank's shard of it."""
        if self.may_lack and name not in self.saved.sources:
            return fragment
        weight = weight_of(self.saved, name)
        return shard_of(weight, fragment.numel(), self.rank) if self.stage == 3 else weight

    def _optimizer(self, tree: Tree, module: Tree) -> Tree:
        """The state dict of DeepSpeed's optimizer, filled.

        `module`: the new model's entries, which are the masters at fp32 stage 0.
        """

        def flats_of(rank: int) -> list[Flat]:
            return flats(tree, module, self.shapes, rank, self.world)

        own = flats_of(self.rank)
        groups = base_state(tree)["param_groups"]
        if self._has_same_groups(own):  # otherwise their settings are the config's
            own_keys = _OF_LAYOUT if self.stage else (*_OF_LAYOUT, *_NOT_AT_STAGE_0)
            groups = [
                group
                | materialize(self.saved.groups[number])
                | {key: group[key] for key in own_keys if key in group}
                for number, group in enumerate(groups)
            ]
        filled_states = self.states(flats_of, groups)
        states = {number: state for number, state in filled_states.items() if state}
        base = {"state": states, "param_groups": groups}
        masters = [filled_master(flat, self.saved) for flat in own]
        if "single_partition_of_fp32_groups" in tree:
            trimmed = without_padding(masters, own)
            filled = {"base_optimizer_state": base, "single_partition_of_fp32_groups": trimmed}
        elif "fp32_flat_groups" in tree:
            filled = {"optimizer_state_dict": base, "fp32_flat_groups": masters}
        elif "fp32_groups_flat" in tree:
            filled = {"optimizer_state_dict": base, "fp32_groups_flat": masters}
        elif "fp32_groups" in tree:
            by_group = [
                [m for m, flat in zip(masters, own, strict=True) if flat.group == number]
                for number in range(len(groups))
            ]
            filled = {"optimizer_state_dict": base, "fp32_groups": by_group}
        else:
            return base
        return tree | filled | self._loss_scaler(tree)

    def _has_same_groups(self, flats: list[Flat]) -> bool:
        """Whether every parameter was in the group of the same number when it was saved.

        One without elements may have been in none.
        """
        pairs = [(flat.group, segment.name) for flat in flats for segment in flat.segments]
        saved, known = self.saved.shapes, range(len(self.saved.groups))
        return all(
            self.saved.group_of(name) == number if name in saved else number in known
            for number, name in pairs
        )

    def _loss_scaler(self, tree: Tree) -> Tree:
        """The state of an fp16 engine's loss scaler, in the form that the tree has."""
        scale = self.saved.loss_scale()
        if "loss_scaler" not in tree:
            return {key: scale[key] for key in scale.keys() & tree.keys()}
        scaler: Any = copy(tree["loss_scaler"])
        vars(scaler).update({key: scale[key] for key in scale.keys() & vars(scaler).keys()})
        return {"loss_scaler": scaler}


def weight_of(saved: SavedEngine, name: str) -> Tensor:
    """An entry of the model's state dict, complete and in the dtype that the model computes in."""
    return read_tensor(saved.weight(name)).to(getattr(torch, saved.model["module"][name].dtype))


def shard_of(weight: Tensor, size: int, rank: int) -> Tensor:
    """A rank's shard of a frozen parameter at stage 3, padded with zeros: (size,)."""
    start, stop = shard_range(numel=weight.numel(), size=size, rank=rank)
    shard = torch.zeros(size, dtype=weight.dtype)
    shard[: stop - start] = weight.reshape(-1)[start:stop]
    return shard


def without_padding(masters: list[Tensor], flats: list[Flat]) -> list[Tensor]:
    """The masters of partitions without their padding, as DeepSpeed saves them."""
    return [m[: m.numel() - flat.padding] for m, flat in zip(masters, flats, strict=True)]


def filled_state(flat: Flat, saved: SavedEngine, like: str | None = None) -> Tree:
    """The optimizer's state of one flat: its part of the moments, and the saved scalars.

    `like`: the parameter whose scalars a flat has, and for which moments, if none of its own
    parameters was saved. Scalars are read again for each flat: two that shared a `step` tensor
    would count every step twice. Raises CheckpointError if the flat's parameters were saved with
    different scalars.
    """
    state: Tree = {}
    if not flat.size:
        return state  # the optimizer makes it, at the first step that has a gradient
    names = [segment.name for segment in flat.segments if segment.name in saved.shapes]
    if not names and like is not None:
        names = [like]
    for name in names:
        for key, value in materialize(saved.scalars(name)).items():
            if state.setdefault(key, value) != value:
                raise CheckpointError(
                    f"optimizer state {key!r} is {value} for parameter {name!r}, and {state[key]} "
                    f"for {names[0]!r}, but ZeRO keeps one value for their group"
                )
    keys = {key for name in names for key in saved.state_keys(name)}
    return state | {key: filled_flat(flat, saved, key) for key in sorted(keys)}


def filled_master(flat: Flat, saved: SavedEngine) -> Tensor:
    """A flat's master from the checkpoint, on the CPU; padding is 0. What the checkpoint lacks is
    the new engine's."""
    segments = [segment for segment in flat.segments if segment.length]
    kept = [segment.name for segment in segments if segment.name in saved.shapes]
    dtype = getattr(torch, saved.master(kept[0]).dtype) if kept else flat.master.dtype
    filled = torch.zeros(flat.shape, dtype=dtype)
    for segment in segments:
        part = filled.view(-1)[segment.flat_slice]
        if segment.name in saved.shapes:
            read_tensor(saved.master(segment.name), segment.start, segment.stop, out=part)
        elif segment.name in saved.sources:  # it was frozen
            read_tensor(saved.weight(segment.name), segment.start, segment.stop, out=part)
        else:
            part.copy_(flat.master.detach().reshape(-1)[segment.flat_slice])
    return filled


def filled_flat(flat: Flat, saved: SavedEngine, key: str) -> Tensor:
    """A flat's moment from the checkpoint, on the CPU; padding, and what the checkpoint lacks, is
    0, but of the EMA the master."""
    filled: Tensor | None = None
    lacking: list[slice] = []
    for segment in filter(lambda segment: segment.length, flat.segments):
        if segment.name not in saved.shapes or key not in saved.state_keys(segment.name):
            lacking.append(segment.flat_slice)  # or the parameter never had a gradient
            continue
        tensor = saved.moment(segment.name, key)
        if filled is None:
            filled = torch.zeros(flat.shape, dtype=getattr(torch, tensor.dtype))
        part = filled.view(-1)[segment.flat_slice]
        read_tensor(tensor, segment.start, segment.stop, out=part)
    filled = torch.zeros(flat.shape) if filled is None else filled
    if key == EMA and lacking:
        master = filled_master(flat, saved).view(-1)
        for part in lacking:
            filled.view(-1)[part] = master[part]
    return filled
