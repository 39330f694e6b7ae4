"""The tensors that a conversion writes: their names, their dtypes, and the bytes of their sources.

Planning reads no tensor. The names are those of the model's state dict; state of the optimizer is
named `optimizer.KEY.NAME`, where KEY is "master" (fp32 weights), "exp_avg", "step" and so on.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.errors import CheckpointError, HarnessError, did_you_mean
from harness.formats.dtypes import FLOATS, SIZES
from harness.formats.pt_reader import TensorRef
from harness.formats.stored_tensor import ByteRange, StoredTensor
from harness.formats.tensor_file import FlatFile
from harness.zero.layout import EMA
from harness.zero.reader import SavedEngine

OPTIMIZER = "optimizer"


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the output: its source, and the dtype that it is written in."""

    source: StoredTensor
    dtype: str
    key: str = ""
    """Which state of the optimizer it is: "master", "exp_avg" ... Empty for a weight."""
    parameter: str = ""
    """The parameter that the state belongs to, by its name in the checkpoint."""

    @property
    def prefix(self) -> str:
        """Of its name, before the parameter's."""
        return f"{OPTIMIZER}.{self.key}." if self.key else ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return self.source.shape

    @property
    def nbytes(self) -> int:
        """Bytes in the output."""
        return self.source.numel() * SIZES[self.dtype]


@dataclass
class ConversionPlan:
    """The tensors by name, in the order of the output."""

    tensors: dict[str, PlannedTensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    """Further names of tied tensors, each with the name that the tensor is stored under."""
    groups: list[Any] = field(default_factory=list)
    """Of the optimizer: settings, and the names of the group's parameters as `params`."""
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    """State of the optimizer that is not a tensor, by key and parameter."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Metadata of the source."""
    notes: list[str] = field(default_factory=list)
    """For the user: where the output has less than expected."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the output."""
        return sum(planned.nbytes for planned in self.tensors.values())

    def ranges(self) -> Iterable[ByteRange]:
        """All bytes that are read."""
        return (range_ for planned in self.tensors.values() for range_ in planned.source.ranges)


def plan_weights(saved: SavedEngine, dtype: str) -> ConversionPlan:
    """The entries of the model's state dict, floating ones in `dtype`; "keep": the model's own.

    Trained parameters are read from their fp32 masters, except where the model's own weights have
    the wanted dtype. Extra state that is a tensor is unchanged; other extra state is left out, with
    a note.
    """
    plan = ConversionPlan()
    weights: Mapping[str, TensorRef] = saved.model["module"] | saved.experts
    for name in dict.fromkeys([*weights, *saved.shapes]):
        own_dtype = weights[name].dtype if name in weights else "float32"
        target = own_dtype if dtype == "keep" else dtype
        needs_master = saved.stage == 3 or target != own_dtype or target == "float32"
        parameter = saved.shared.get(name, name)
        if parameter in saved.shapes and needs_master:
            source = saved.master(parameter)
        else:
            source = saved.weight(name)
        plan.tensors[name] = PlannedTensor(source, _target_dtype(source.dtype, target))
    for name, value in saved.extra.items():
        if isinstance(value, TensorRef):
            plan.tensors[name] = PlannedTensor(StoredTensor.from_ref(value), value.dtype)
        else:
            kind = type(value).__name__
            plan.notes.append(f"{name!r} is not a tensor, and is left out: a {kind}")
    if not saved.has_parameter_names and saved.optimizer is not None:
        dtypes = {ref.dtype for ref in weights.values()} & {"float16", "bfloat16"}
        if dtypes and dtype not in ("keep", *dtypes):
            plan.notes.append(
                "DeepSpeed does not name the fp32 masters at ZeRO 0: the weights are the "
                f"{', '.join(dtypes)} ones that the model computes with"
            )
    return plan


def plan_ema(saved: SavedEngine, dtype: str) -> ConversionPlan:
    """As `plan_weights`, with the averages of `engines.NAME.ema_decay` in place of the weights.

    What is not averaged, frozen parameters and buffers, is unchanged. Raises CheckpointError if
    there are no averages.
    """
    plan = plan_weights(saved, dtype)
    has_average = False
    for name, planned in plan.tensors.items():
        parameter = saved.shared.get(name, name)
        if parameter in saved.shapes and EMA in saved.state_keys(parameter):
            plan.tensors[name] = PlannedTensor(saved.moment(parameter, EMA), planned.dtype)
            has_average = True
    if not has_average:
        raise CheckpointError(
            f"{saved.directory}: it has no average of the weights: engines.NAME.ema_decay saves one"
        )
    return plan


def plan_optimizer(saved: SavedEngine) -> ConversionPlan:
    """Masters, moments and further state of every parameter, and settings of the groups.

    Raises CheckpointError if there is none, parameters are not named, or the state has other shapes
    than the parameters.
    """
    if saved.optimizer is None:
        raise CheckpointError(f"{saved.directory}: it has no state of an optimizer")
    if not saved.has_parameter_names:
        raise CheckpointError(
            f"{saved.directory}: at ZeRO 0 DeepSpeed does not say which parameter the optimizer's "
            "state belongs to"
        )
    saved.check_moments()
    plan = ConversionPlan()
    for name in saved.shapes:
        state = {"master": saved.master(name)}
        state |= {key: saved.moment(name, key) for key in saved.state_keys(name)}
        for key, value in saved.scalars(name).items():
            if isinstance(value, TensorRef):
                state[key] = StoredTensor.from_ref(value)
            else:
                plan.values.setdefault(key, {})[name] = value
        for key, tensor in state.items():
            planned = PlannedTensor(tensor, tensor.dtype, key, name)
            plan.tensors[planned.prefix + name] = planned
    plan.groups = [
        group | {"params": [name for name in saved.shapes if saved.group_of(name) == number]}
        for number, group in enumerate(saved.groups)
    ]
    return plan


def plan_engine(saved: SavedEngine, what: str, dtype: str) -> ConversionPlan:
    """`what`: "weights", "ema", "optimizer" or "all"."""
    if what == "ema":
        return plan_ema(saved, dtype)
    plan = plan_weights(saved, dtype) if what in ("weights", "all") else ConversionPlan()
    if what in ("optimizer", "all"):
        state = plan_optimizer(saved)
        if clashes := sorted(plan.tensors.keys() & state.tensors.keys()):
            raise CheckpointError(
                f"{saved.directory}: {clashes[0]!r} is both a weight and state of the optimizer: "
                "convert them one by one, with --what weights and --what optimizer"
            )
        plan.tensors |= state.tensors
        plan.groups, plan.values = state.groups, state.values
    return plan


def plan_file(content: FlatFile, dtype: str) -> ConversionPlan:
    """The tensors of a file."""
    plan = ConversionPlan(metadata=dict(content.metadata))
    for name, stored in content.tensors.items():
        target = stored.dtype if dtype == "keep" else dtype
        plan.tensors[name] = PlannedTensor(stored, _target_dtype(stored.dtype, target))
    return plan


def _target_dtype(dtype: str, wanted: str) -> str:
    return wanted if dtype in FLOATS and wanted in FLOATS else dtype


def select(plan: ConversionPlan, include: Sequence[str], exclude: Sequence[str]) -> None:
    """Keeps the tensors whose name matches a pattern of `include`, if there is one, and none of
    `exclude`. Raises HarnessError for an invalid pattern, or one that matches no name.
    """
    wanted, unwanted = [_compiled(text) for text in include], [_compiled(text) for text in exclude]
    for pattern in wanted + unwanted:
        if not any(pattern.search(name) for name in plan.tensors):
            hint = did_you_mean(pattern.pattern, plan.tensors)
            raise HarnessError(f"no tensor has a name that matches {pattern.pattern!r}{hint}")
    plan.tensors = {
        name: planned
        for name, planned in plan.tensors.items()
        if (not wanted or any(p.search(name) for p in wanted))
        and not any(p.search(name) for p in unwanted)
    }
    if not plan.tensors:
        raise HarnessError("no tensor is left to be written")


def rename(plan: ConversionPlan, renames: Sequence[str]) -> None:
    """Applies "OLD=NEW" to every name, in order: each match of the pattern OLD becomes NEW.

    Of the optimizer's state the parameter's name is changed, so that both keep the same name.
    Raises HarnessError for a pattern that is invalid, changes nothing, or gives two tensors the
    same name or a tensor an empty one.
    """
    for text in renames:
        old, equals, new = text.partition("=")
        if not equals or not old:
            raise HarnessError(f"--rename {text}: expected OLD=NEW")
        pattern = _compiled(old)
        try:
            new_names = {
                name: p.prefix + pattern.sub(new, name.removeprefix(p.prefix))
                for name, p in plan.tensors.items()
            }
        except (re.error, IndexError) as error:
            raise HarnessError(f"--rename {text}: {error}") from None
        if all(name == new_name for name, new_name in new_names.items()):
            raise HarnessError(f"--rename {text}: no name has {old!r} in it")
        renamed: dict[str, PlannedTensor] = {}
        for name, new_name in new_names.items():
            if new_name == plan.tensors[name].prefix:
                raise HarnessError(f"--rename {text}: nothing would be left of {name!r}")
            if new_name in renamed:
                raise HarnessError(f"--rename {text}: two tensors would be named {new_name!r}")
            renamed[new_name] = plan.tensors[name]
        plan.tensors = renamed


def output_metadata(plan: ConversionPlan) -> dict[str, str]:
    """The metadata of the output. The settings of the optimizer are JSON with the parameters' new
    names; parameters without a tensor in the output are left out."""
    if not plan.groups:
        return plan.metadata
    names = {
        planned.parameter: name.removeprefix(planned.prefix)
        for name, planned in plan.tensors.items()
        if planned.key
    }
    groups = [
        group | {"params": [names[name] for name in group["params"] if name in names]}
        for group in plan.groups
    ]
    values = {
        key: {names[name]: value for name, value in by_parameter.items() if name in names}
        for key, by_parameter in plan.values.items()
    }
    settings = json.dumps({"param_groups": groups, "state": values}, default=str)
    return plan.metadata | {OPTIMIZER: settings}


def deduplicate(plan: ConversionPlan) -> None:
    """Keeps one of the tensors that have the same bytes; the others become its aliases."""
    names: dict[Any, str] = {}
    for name, planned in list(plan.tensors.items()):
        strided = planned.source.strided
        view = (strided.stride, strided.offset) if strided else ()
        key = (planned.source.ranges, planned.dtype, planned.shape, view)
        if not planned.source.ranges:
            continue
        if key in names:
            plan.aliases[name] = names[key]
            del plan.tensors[name]
        else:
            names[key] = name


def _compiled(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise HarnessError(f"{text!r} is not a regular expression: {error}") from None


def print_plan(plan: ConversionPlan, print_line: Callable[[str], object]) -> None:
    """Prints a line for each tensor, and the total."""
    width = max(map(len, [*plan.tensors, *plan.aliases]), default=0)
    for name, planned in plan.tensors.items():
        files = {range_.path for range_ in planned.source.ranges}
        old, new = planned.source.dtype, planned.dtype
        dtype = new if old == new else f"{old} -> {new}"
        print_line(
            f"{name:<{width}}  {dtype:<20}  {list(planned.shape)!s:<16}  "
            f"{planned.nbytes:>14,} bytes from {len(files)} file{'s' * (len(files) != 1)}"
        )
    for name, stored_name in plan.aliases.items():
        print_line(f"{name:<{width}}  = {stored_name}")
    print_line(f"{len(plan.tensors)} tensors, {plan.nbytes:,} bytes")
