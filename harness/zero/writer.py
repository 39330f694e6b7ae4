"""Writes an engine's files, outside of a run, for plain DeepSpeed to resume in another layout.

`checkpoint.reshard` does this for a running engine, whose trees say where everything belongs. This
module builds the trees as DeepSpeed would for the same parameters at a ZeRO stage and a number of
ranks (runtime/zero/stage_1_and_2.py, runtime/zero/stage3.py), and fills them by the same functions.
"""

from collections.abc import Iterable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from harness.errors import CheckpointError, FormatError
from harness.io import placeholder_pickle
from harness.io.stored import materialize
from harness.utils import write_durably
from harness.zero.layout import Shapes, Tree, flats
from harness.zero.partition import (
    SUB_GROUP_SIZE,
    partition_padding,
    partition_size,
    round_robin_order,
    shard_size,
    shards_numel,
    sub_groups,
)
from harness.zero.reader import SavedEngine
from harness.zero.refill import (
    filled_master,
    filled_state,
    shard_of,
    weight_of,
    without_padding,
)

_BY_LAYOUT = (
    "module",
    "optimizer",
    "param_shapes",
    "frozen_param_shapes",
    "frozen_param_fragments",
)


class ZeroWriter:
    """A checkpoint for `ranks` ranks at ZeRO `stage` 1, 2 or 3, made from a saved engine.

    `round_robin`: round_robin_gradients of the engine that will load it; None: false, and an error
    if it was true for the saved engine.
    """

    def __init__(self, saved: SavedEngine, stage: int, ranks: int, round_robin: bool | None):
        """Raises CheckpointError for what cannot be resharded."""
        source = saved.directory
        if saved.optimizer is None or not saved.has_parameter_names:
            raise CheckpointError(f"{source}: has no optimizer state with parameter names")
        if saved.experts:
            raise CheckpointError(f"{source}: experts cannot be resharded")
        saved.check_moments()
        self.saved, self.stage, self.ranks = saved, stage, ranks
        if "ds_config" not in saved.model:
            raise CheckpointError(
                f"{source}: has no ds_config, as before DeepSpeed 0.4: only its weights and its "
                "optimizer state can be converted, without --to-zero"
            )
        self._unchanged: Tree = {
            key: self._of_source(key, value)
            for key, value in saved.model.items()
            if key not in _BY_LAYOUT
        }
        self._extra: Tree = {key: self._of_source(key, value) for key, value in saved.extra.items()}
        self._settings: list[Tree] = [self._of_source("param_groups", g) for g in saved.groups]
        self.config: Tree = deepcopy(self._unchanged["ds_config"])
        self._zero: Tree = self.config.setdefault("zero_optimization", {})
        self._is_fp16 = bool(self.config.get("fp16", {}).get("enabled"))
        self._is_bf16 = bool(self.config.get("bf16", {}).get("enabled"))
        if self._zero.get("parameter_alignment") and stage < 3:
            raise CheckpointError(
                f"{source}: parameter_alignment is set, which is supported only with --to-zero 3"
            )
        was_round_robin = bool(self._zero.get("round_robin_gradients"))
        if was_round_robin and round_robin is None and stage < 3:
            raise CheckpointError(
                f"{source}: saved with round_robin_gradients = true, which makes the order of the "
                "parameters depend on the number of ranks. DeepSpeed does not check it, and loads "
                "wrong weights if it differs: pass --round-robin true or false, as set for the "
                "engine that will load it"
            )
        self._groups = self._ordered(was_round_robin)
        self._zero["stage"] = stage
        if stage < 3:
            self._zero["round_robin_gradients"] = bool(round_robin)
            if round_robin:
                self._groups = [round_robin_order(names, world=ranks) for names in self._groups]
        self._parts = self._groups if stage < 3 else list(self._sub_groups())

    def _of_source(self, key: str, value: Any) -> Any:
        """A value of the source, to be written again. Raises CheckpointError if it cannot be."""
        try:
            return materialize(value)
        except FormatError as error:
            raise CheckpointError(f"{self.saved.directory}: {key!r:.80}: {error}") from None

    def _ordered(self, was_round_robin: bool) -> list[list[str]]:
        """The names by parameter group, in the optimizer's order."""
        saved = self.saved
        groups = [
            [name for name in saved.shapes if saved.group_of(name) == number]
            for number in range(len(saved.groups))
        ]
        if was_round_robin and saved.stage in (1, 2):
            dealt = [
                round_robin_order(range(len(names)), world=saved.world_size) for names in groups
            ]
            groups = [
                [name for _, name in sorted(zip(indices, names, strict=True))]
                for indices, names in zip(dealt, groups, strict=True)
            ]
        return groups

    def _sub_groups(self) -> Iterator[list[str]]:
        """ZeRO 3: the names by sub-group."""
        limit = int(self._zero.get("sub_group_size", SUB_GROUP_SIZE))
        for names in self._groups:
            yield from sub_groups(sizes=self._numel(names), world=self.ranks, limit=limit)

    def _numel(self, names: Iterable[str]) -> dict[str, int]:
        """The number of elements of parameters, by name."""
        return {name: self.saved.shapes[name].numel() for name in names}

    @property
    def notes(self) -> list[str]:
        """Settings that must match when the files are loaded, and that DeepSpeed does not check."""
        notes = []
        if self.stage < 3:
            setting = str(self._zero["round_robin_gradients"]).lower()
            notes.append(
                f"for round_robin_gradients = {setting}: DeepSpeed does not check it, and an "
                "engine with another setting loads the weights of other parameters"
            )
        elif "sub_group_size" in self._zero:
            notes.append(f"for sub_group_size = {self._zero['sub_group_size']}")
        return notes

    @property
    def shapes(self) -> list[Shapes]:
        """The shapes by name of each (sub-)group, as in model_states."""
        sizes = self.saved.shapes
        return [{name: torch.Size(sizes[name]) for name in part} for part in self._parts]

    def write(self, directory: Path) -> None:
        """Writes the files of a tag into `directory`, rank by rank."""
        prefix = "bf16_" if self._is_bf16 else ""
        for rank in range(self.ranks):
            if self.stage == 3:
                _write(
                    self._model(rank),
                    directory / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt",
                )
            elif rank == 0:
                _write(self._model(rank), directory / "mp_rank_00_model_states.pt")
            tree = {
                "optimizer_state_dict": self._optimizer(rank),
                "ds_config": self.config,
                "ds_version": self.saved.model.get("ds_version"),
            }
            _write(tree, directory / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")

    def _model(self, rank: int) -> Tree:
        saved = self.saved
        old: Tree = saved.model["module"]
        tensors: Tree = {}
        frozen: Tree = {}
        for name in dict.fromkeys(map(saved.source, old)):
            dtype = getattr(torch, old[name].dtype)
            is_sharded = self.stage == 3 and not saved.is_buffer(name)
            tensors[name] = torch.empty(0, dtype=dtype) if is_sharded else weight_of(saved, name)
            if name not in saved.shapes and not saved.is_buffer(name):
                frozen[name] = weight_of(saved, name) if is_sharded else tensors[name]
        module = {name: tensors[saved.source(name)] for name in old}
        module |= self._extra
        shapes = {name: tensor.shape for name, tensor in frozen.items()}
        fragments = frozen
        if self.stage == 3:
            fragments = {
                name: shard_of(tensor, shard_size(numel=tensor.numel(), world=self.ranks), rank)
                for name, tensor in frozen.items()
            }
        return self._unchanged | {
            "module": module,
            "optimizer": None,
            "shared_params": saved.shared,
            "param_shapes": self.shapes,
            "frozen_param_shapes": shapes if self.stage > 1 else None,
            "frozen_param_fragments": fragments if self.stage > 1 else None,
            "dp_world_size": self.ranks,
            "ds_config": self.config,
        }

    def _optimizer(self, rank: int) -> Tree:
        """DeepSpeed's optimizer state of a rank."""
        tree = self._partitions(rank) if self.stage < 3 else self._shards()
        tree["zero_stage"] = self.stage
        own = flats(tree, {}, self.shapes, rank, self.ranks)
        masters = [filled_master(flat, self.saved) for flat in own]
        states = {number: filled_state(flat, self.saved) for number, flat in enumerate(own)}
        key = "base_optimizer_state" if self.stage < 3 else "optimizer_state_dict"
        tree[key]["state"] = {number: state for number, state in states.items() if state}
        if self.stage < 3:
            trimmed = without_padding(masters, own)
            tree["single_partition_of_fp32_groups"] = [master.clone() for master in trimmed]
        else:
            tree["fp32_flat_groups"] = masters
        old = self.saved.optimizer or {}
        return tree | {
            "loss_scaler": self._loss_scaler(),
            "dynamic_loss_scale": old.get("dynamic_loss_scale", False),
            "overflow": old.get("overflow", False),
            "ds_version": self.saved.model.get("ds_version"),
        }

    def _partitions(self, rank: int) -> Tree:
        """ZeRO 1 and 2: how every group is partitioned."""
        masters, paddings = [], []
        for names in self._parts:
            total = sum(self._numel(names).values())
            size = partition_size(numel=total, world=self.ranks)
            padding = partition_padding(numel=total, size=size, rank=rank)
            masters.append(torch.empty(size - padding, device="meta"))
            paddings.append(padding)
        return {
            "single_partition_of_fp32_groups": masters,
            "group_paddings": paddings,
            "param_alignment_paddings": [[0] * len(names) for names in self._parts],
            "partition_count": [self.ranks] * len(self._parts),
            "base_optimizer_state": self._base([[n] for n in range(len(self._parts))]),
        }

    def _shards(self) -> Tree:
        """ZeRO 3: how every sub-group is sharded."""
        sizes = [shards_numel(sizes=self._numel(part), world=self.ranks) for part in self._parts]
        owners = [self.saved.group_of(part[0]) for part in self._parts]
        numbers = [
            [n for n, owner in enumerate(owners) if owner == group]
            for group in range(len(self._groups))
        ]
        return {
            "fp32_flat_groups": [torch.empty(size, device="meta") for size in sizes],
            "partition_count": self.ranks,
            "optimizer_state_dict": self._base(numbers),
        }

    def _base(self, numbers: list[list[int]]) -> Tree:
        groups = [
            {**group, "params": params}
            for group, params in zip(self._settings, numbers, strict=True)
        ]
        return {"state": {}, "param_groups": groups}

    def _loss_scaler(self) -> Any:
        """DeepSpeed's loss scaler in its saved state."""
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

        if not self._is_fp16:
            return LossScaler(scale=1)
        old = (self.saved.optimizer or {}).get("loss_scaler")
        if old is None:
            raise CheckpointError(
                f"{self.saved.directory}: fp16 saved at ZeRO 0 cannot be resharded"
            )
        is_dynamic = old.class_name.endswith("DynamicLossScaler")
        kind = DynamicLossScaler if is_dynamic else LossScaler
        scaler = kind.__new__(kind)
        vars(scaler).update(materialize(old.state))
        return scaler


def _write(tree: Tree, path: Path) -> None:
    write_durably(tree, path, placeholder_pickle)
