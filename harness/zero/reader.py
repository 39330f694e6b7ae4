"""One engine's files of a checkpoint, as DeepSpeed writes them: everything by parameter name.

Neither torch nor DeepSpeed is imported: of the tensors, only the ranges in the files are looked up.
"""

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.errors import CheckpointError, first_few
from harness.formats import file_kinds, pt_reader
from harness.formats.pickled import UnsupportedTensor, describe
from harness.formats.pt_reader import Shape, TensorRef
from harness.formats.stored_tensor import ByteRange, StoredTensor
from harness.formats.tensor_file import is_extra_state
from harness.remote_path import is_remote, map_reads
from harness.zero.layout import (
    PARAMETER_NAMES,
    Flat,
    Segment,
    Shapes,
    Tree,
    base_state,
    flats,
    group_shapes,
)
from harness.zero.names import renamed
from harness.zero.rank_files import check_rank_files, plain_int
from harness.zero.tied_names import place, source_names

_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIONAL = ("param_shapes", "frozen_param_shapes", "frozen_param_fragments", "shared_params")
"""Keys of model_states that are not in files of every version of DeepSpeed."""
_OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_EXPERT = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_(\d+)_model_states\.pt")


def is_engine(directory: Path) -> bool:
    """Whether a directory holds files of an engine, as DeepSpeed names them."""
    return directory.is_dir() and any(_MODEL.fullmatch(p.name) for p in directory.iterdir())


def check_is_complete(path: Path) -> None:
    """Raises CheckpointError if a file has weights of one rank only: an optimizer's state, or the
    model file of stage 3, which holds placeholders in place of weights."""
    if file_kinds.format_of(path) != file_kinds.PT:
        return
    tree = pt_reader.read(path)
    if not isinstance(tree, dict):
        return
    state = tree.get("optimizer_state_dict")
    if isinstance(state, dict) and "partition_count" in state:
        raise CheckpointError(
            f"{path}: the optimizer's state of one rank of a ZeRO checkpoint: the weights are in "
            f"the files of all ranks: give the directory that holds them, like {path.parent}"
        )
    if not isinstance(tree.get("module"), dict):
        return
    groups = [*(tree.get("param_shapes") or ()), tree.get("frozen_param_shapes") or {}]
    for name, shape in ((n, s) for group in groups for n, s in group.items()):
        ref = tree["module"].get(name)
        if isinstance(ref, TensorRef) and ref.numel() != Shape(shape).numel():
            raise CheckpointError(
                f"{path}: the file of one rank of a ZeRO 3 checkpoint, without the weights of "
                f"{name!r}: they are in the files of all ranks: give the directory that holds "
                f"them, like {path.parent}"
            )


class SavedEngine:
    """The files of `directory`, opened: our `step-N/ENGINE/`, or a tag of plain DeepSpeed.

    `model` is rank 0's tree of model_states, with a `TensorRef` for every tensor; `extra` what the
    modules' `get_extra_state` returned, tensors or anything else, by its name in the state dict,
    and whatever else there is not a tensor;
    `shapes` are those of the parameters that the optimizer steps; `groups` its parameter groups
    without their parameters; `flats` the flat tensors of every rank (at stage 0 of one), in the
    optimizer's own numbering; `omitted` further names of tied frozen parameters that DeepSpeed's
    `exclude_frozen_parameters` left in the state dict, without the parameters.
    """

    def __init__(self, directory: Path, names: Mapping[str, str] | None = None):
        """`names`: what entries of the model are called here, by their names in the files.

        Raises CheckpointError or FormatError if a file is missing, damaged, of another run, or in
        an unknown layout (`layout.flats`).
        """
        if not directory.is_dir():
            raise CheckpointError(f"{directory}: not a directory")
        self.directory = directory
        models = self._read_ranks(_MODEL)
        optimizers = self._read_ranks(_OPTIMIZER)
        if 0 not in models:
            raise CheckpointError(
                f"{directory}: not a DeepSpeed checkpoint: no model_states.pt of rank 0"
            )
        if names:
            models = {rank: renamed(tree, names) for rank, tree in models.items()}
        self.model: Tree = models[0]
        try:
            self._open(models, optimizers)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise CheckpointError(
                f"{directory}: not in a known layout of DeepSpeed: {error!r}"
            ) from None
        except CheckpointError as error:
            raise CheckpointError(f"{directory}: {error}") from None

    def _open(self, models: dict[int, Tree], optimizers: dict[int, Tree]) -> None:
        model = self.model
        for rank, tree in models.items():
            tree.update(dict.fromkeys(_OPTIONAL) | tree)
            if tree["param_shapes"] is None:  # they are there before 0.6
                tree["param_shapes"] = optimizers.get(rank, {}).get("param_shapes")
        if "module" not in model or "dp_world_size" not in model:
            raise CheckpointError("not a DeepSpeed checkpoint: model_states has no module")
        module: Tree = model["module"]
        self.extra: Tree = {
            name: module.pop(name)
            for name, value in [*module.items()]
            if is_extra_state(name) or not isinstance(value, TensorRef)
        }
        for name, value in self.extra.items():
            if isinstance(value, UnsupportedTensor):
                raise CheckpointError(f"{name!r} cannot be read: it is {describe(value)}")
        self.world_size: int = model["dp_world_size"]
        if type(self.world_size) is not int or self.world_size < 1:
            raise CheckpointError(
                f"dp_world_size = {self.world_size!r:.80}: expected a number of ranks >= 1"
            )
        states = {rank: tree["optimizer_state_dict"] for rank, tree in optimizers.items()}
        self.stage = plain_int(states[0].get("zero_stage", 1)) if states else 0
        if len(models) > 1 or self._is_sharded():
            self.stage = 3
        check_rank_files(models, states, self.world_size, self.stage)
        self.experts: Tree = {}
        self._read_experts()
        self._fragments = [models[rank]["frozen_param_fragments"] for rank in sorted(models)]
        if model["optimizer"] is not None:
            states = {0: model["optimizer"]}
        self.optimizer: Tree | None = states.get(0)
        self.groups: list[Tree] = []
        self.flats: list[list[Flat]] = []
        self.shapes: dict[str, Shape] = {}
        self._pieces: dict[str, list[tuple[Segment, Flat]]] = {}
        self._flat_tensors: dict[TensorRef, StoredTensor] = {}
        if self.optimizer is not None and self.has_parameter_names:
            self._locate(self.optimizer, states)
        self.omitted: list[str] = []
        if "buffer_names" not in model:  # before 0.4
            model["buffer_names"] = [
                name for name, ref in module.items() if name not in self.shapes and ref.numel()
            ]
        if self.stage == 3 and model["frozen_param_fragments"] is None:
            self.omitted = [name for name in module if name not in self.sources]
            for name in self.omitted:
                del module[name]

    def _locate(self, optimizer: Tree, states: dict[int, Tree]) -> None:
        """Finds the flats, and the pieces of every parameter in them."""
        model = self.model
        for group in base_state(optimizer)["param_groups"]:
            self.groups.append({key: value for key, value in group.items() if key != "params"})
        shapes: list[Shapes] = [
            {name: Shape(size) for name, size in group.items()} for group in group_shapes(model)
        ]
        sizes: dict[str, Shape] = {name: size for group in shapes for name, size in group.items()}
        for rank in sorted(states):
            of_rank = flats(states[rank], model["module"], shapes, rank, self.world_size)
            self.flats.append(of_rank)
            for flat in of_rank:
                for segment in flat.segments:
                    self._pieces.setdefault(segment.name, []).append((segment, flat))
        for name in self._pieces:
            self.shapes[name] = sizes[name] if name in sizes else self.experts[name].shape
            self._check_pieces(name)

    @property
    def has_parameter_names(self) -> bool:
        """Whether the names of the parameters are recorded; plain DeepSpeed does not at stage 0."""
        return self.model["param_shapes"] is not None or PARAMETER_NAMES in self.model

    @cached_property
    def sources(self) -> dict[str, str]:
        """By name of the model's state dict, the one under which its tensor is kept; not its own
        for further names of tied tensors (`tied_names`), and missing if the files do not have it.
        """
        module: dict[str, TensorRef] = self.model["module"]
        buffers = set(self.model["buffer_names"])
        owners = {*self.shapes, *(self.model.get("frozen_param_shapes") or ())}
        complete = buffers if self.stage == 3 else module
        listed = self.model.get("shared_params") or {}
        listed = {name: listed[name] for name in listed.keys() - buffers}
        names = source_names(module, owners, complete, listed)
        return {name: name for name in (*self.experts, *self.shapes)} | names

    @property
    def shared(self) -> dict[str, str]:
        """Further names of tied tensors, each with the name under which the tensor is kept."""
        return {name: source for name, source in self.sources.items() if name != source}

    def source(self, name: str) -> str:
        """`sources[name]`. Raises CheckpointError if the files do not have the tensor."""
        if name in self.sources:
            return self.sources[name]
        module: dict[str, TensorRef] = self.model["module"]
        if name not in module:
            raise CheckpointError(f"{self.directory}: has no weights of {name!r}")
        here = (n for n in module if n != name and place(module[n]) == place(module[name]))
        listed = (self.model.get("shared_params") or {}).get(name)
        raise CheckpointError(
            f"{self.directory}: the weights of {name!r} cannot be found: the state dict has a "
            "placeholder for it, but no shards are saved under this name, and which parameter it "
            "is tied to is not recorded: at the place of the placeholder in the file are those of "
            f"{first_few(here) or 'no other name'}, and shared_params has {listed!r}. Load the "
            "checkpoint in the layout that it was saved in, and save it again"
        )

    def is_buffer(self, name: str) -> bool:
        """Whether an entry of the state dict is a buffer. `buffer_names` lacks further names."""
        return self.sources.get(name, name) in self.model["buffer_names"]

    @property
    def weights(self) -> dict[str, TensorRef]:
        """The tensors of the model's state dict by name, those of experts included, as the files
        hold them: at stage 3 with placeholders for sharded parameters (`weight` completes them).
        """
        return self.model["module"] | self.experts

    @property
    def global_steps(self) -> int:
        """Optimizer steps that DeepSpeed has counted."""
        return self.model["global_steps"]

    def group_of(self, name: str) -> int:
        """The parameter group of a parameter."""
        return self._pieces[name][0][1].group

    def state_keys(self, name: str) -> list[str]:
        """The keys of the state of the parameter's size (`exp_avg`, ...)."""
        flat = self._pieces[name][0][1]
        return [key for key in flat.state if self._is_moment(flat, key)]

    def scalars(self, name: str) -> Tree:
        """The rest of a parameter's state (`step`, ...): plain values, or tensors of shape ()."""
        flat = next((f for s, f in self._pieces[name] if s.length), None)
        if flat is None:
            return {}
        return {k: value for k, value in flat.state.items() if not self._is_moment(flat, k)}

    @cached_property
    def _moments(self) -> set[str]:
        """The keys of moments that some parameter has dimensions for."""
        states = (flat.state for of_rank in self.flats for flat in of_rank)
        return {key for state in states for key, value in state.items() if _has_dimensions(value)}

    def _is_moment(self, flat: Flat, key: str) -> bool:
        """Whether an entry of the state is of the parameter's size. Of a parameter without
        dimensions, at stage 0, it has the shape of a scalar: other parameters tell."""
        value = flat.state[key]
        if flat.shape.numel() != 1 or len(flat.shape) or not isinstance(value, TensorRef):
            return _has_dimensions(value)
        return key in self._moments if self._moments else key != "step"

    def check_moments(self) -> None:
        """Raises CheckpointError if the optimizer's state does not have the parameters' shapes, or
        is in 8 bits, with separate scales."""
        for flat in (flat for pieces in self._pieces.values() for _, flat in pieces):
            for key, value in flat.state.items():
                if isinstance(value, dict):
                    raise CheckpointError(
                        f"optimizer state {key!r} of parameter {flat.segments[0].name!r} is a dict "
                        "of tensors, as of 8-bit optimizers: it cannot be resharded or converted"
                    )
                if _has_dimensions(value) and value.shape != flat.shape:
                    raise CheckpointError(
                        f"optimizer state {key!r} of parameter {flat.segments[0].name!r} has the "
                        f"shape {tuple(value.shape)}, expected {tuple(flat.shape)}, as of the "
                        "master weights: it cannot be resharded or converted"
                    )

    def master(self, name: str) -> StoredTensor:
        """A parameter's complete fp32 master, in its shape."""
        return self._joined(name, [(s, f.master) for s, f in self._pieces[name]])

    def moment(self, name: str, key: str) -> StoredTensor:
        """A parameter's complete optimizer state of its size, in its shape."""
        return self._joined(name, [(s, f.state[key]) for s, f in self._pieces[name]])

    def weight(self, name: str) -> StoredTensor:
        """An entry of the model's state dict, complete; at stage 3 a parameter's master.

        Otherwise it is in the dtype that the model computes in.
        """
        if name in self.experts:
            return StoredTensor.from_ref(self.experts[name])
        source = self.source(name)
        if self.stage < 3 or self.is_buffer(name):
            return StoredTensor.from_ref(self.model["module"][name])
        name = source
        if name in self.shapes:
            return self.master(name)
        shape = Shape(self.model["frozen_param_shapes"][name])
        shards = [StoredTensor.from_ref(fragments[name]) for fragments in self._fragments]
        ranges: list[ByteRange] = []
        left = shape.numel() * shards[0].itemsize
        for shard in shards:
            for stretch in shard.cut(0, left):
                ranges.append(stretch)
                left -= stretch.size
        if left:
            raise CheckpointError(f"{self.directory}: frozen parameter {name!r} is incomplete")
        return StoredTensor(shards[0].dtype, shape, tuple(ranges))

    def loss_scale(self) -> Tree:
        """The state of an fp16 engine's loss scaler; {} at fp32 stage 0."""
        scaler = self.optimizer or {}
        if "loss_scaler" in scaler:
            scaler = scaler["loss_scaler"].state
        keys = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
        return {key: scaler[key] for key in keys if key in scaler}

    def _read_ranks(self, pattern: re.Pattern[str]) -> dict[int, Tree]:
        """The trees of one kind of file by rank."""
        paths: dict[Path, int] = {}
        for path in sorted(self.directory.iterdir()):
            if (match := pattern.fullmatch(path.name)) and int(match[2]):
                raise CheckpointError(
                    f"{path}: tensor and pipeline parallelism (mp_rank > 0) are not supported"
                )
            if match:
                paths[path] = int(match[1] or 0)
        read = map_reads(pt_reader.read, paths, is_remote(paths))
        trees: dict[int, Tree] = {}
        for (path, rank), tree in zip(paths.items(), read, strict=True):
            if not isinstance(tree, dict):
                raise CheckpointError(
                    f"{path}: not a file of a DeepSpeed checkpoint: it holds {describe(tree)}"
                )
            trees[rank] = tree
        return trees

    def _read_experts(self) -> None:
        """DeepSpeed's experts, each in its own file."""
        present: set[tuple[int, int]] = set()
        for path in sorted(self.directory.iterdir()):
            if match := _EXPERT.fullmatch(path.name):
                present.add((int(match[1]), int(match[2])))
                self.experts |= pt_reader.read(path)
        for layer, count in enumerate(self.model.get("num_experts") or ()):
            if missing := first_few(n for n in range(count) if (layer, n) not in present):
                raise CheckpointError(
                    f"layer_{layer}_expert_N_..._model_states.pt are missing for N = {missing}: "
                    f"the layer has {count} experts"
                )

    def _is_sharded(self) -> bool:
        return any(self.directory.glob("zero_pp_rank_*_model_states.pt"))

    def _check_pieces(self, name: str) -> None:
        end = 0
        for segment, _ in self._pieces[name]:
            if segment.length and segment.start != end:
                raise CheckpointError(f"parameter {name!r} is incomplete from element {end} on")
            end += segment.length
        if end != self.shapes[name].numel():
            raise CheckpointError(f"parameter {name!r} is incomplete from element {end} on")

    def _joined(self, name: str, pieces: list[tuple[Segment, TensorRef]]) -> StoredTensor:
        shape = self.shapes[name]
        if len(pieces) == 1 and pieces[0][1].shape == shape:
            return StoredTensor.from_ref(pieces[0][1])
        ranges: list[ByteRange] = []
        for segment, ref in pieces:
            if segment.length:
                flat = self._flat_tensors.get(ref)
                if flat is None:  # the same for all parameters in it
                    flat = self._flat_tensors[ref] = StoredTensor.from_ref(ref)
                if flat.strided is not None:
                    raise CheckpointError(f"{ref.path}: the state of {name!r} is not contiguous")
                width = flat.itemsize
                ranges += flat.cut(segment.offset * width, segment.length * width)
        return StoredTensor(pieces[0][1].dtype, shape, tuple(ranges))


def _has_dimensions(value: Any) -> bool:
    return isinstance(value, TensorRef) and value.dim() > 0
