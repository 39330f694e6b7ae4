"""The tensors that a conversion writes: names, dtypes, and byte ranges of their sources.

Planning reads no tensor data. Names are those of the model's state dict; optimizer state is named
`optimizer.KEY.NAME`, where KEY is "master" (fp32 weights), "exp_avg", "step" and so on.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.errors import (
    CheckpointError,
    HarnessError,
    compile_pattern,
    counted,
    did_you_mean,
    printable,
)
from harness.formats import tied_weights
from harness.formats.dtypes import FLOATS, SIZES
from harness.formats.known_values import NumpyScalar
from harness.formats.pickled import describe
from harness.formats.pt_reader import TensorRef
from harness.formats.stored_tensor import ByteRange, StoredTensor
from harness.formats.tensor_file import TensorFile
from harness.zero.layout import EMA
from harness.zero.reader import SavedEngine

OPTIMIZER = "optimizer"


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the output: its source, and its dtype in the output."""

    source: StoredTensor
    dtype: str
    key: str = ""
    """The key of optimizer state: "master", "exp_avg", ... Empty for a weight."""
    parameter: str = ""
    """The name in the checkpoint of the parameter that the state belongs to."""

    @property
    def prefix(self) -> str:
        """The part of its name before the parameter's name."""
        return f"{OPTIMIZER}.{self.key}." if self.key else ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
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
    """Other names of tied tensors, with the name under which each is stored."""
    groups: list[Any] = field(default_factory=list)
    """Parameter groups of the optimizer: settings, and parameter names as `params`."""
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Optimizer state that is not a tensor, by key and parameter."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Metadata of the source."""
    notes: list[str] = field(default_factory=list)
    """For the user: what the output lacks."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the output."""
        return sum(planned.nbytes for planned in self.tensors.values())

    @property
    def count(self) -> str:
        """How many tensors, in words."""
        return counted(len(self.tensors), "tensor") + tied_weights.note(len(self.aliases))

    def ranges(self) -> Iterable[ByteRange]:
        """All byte ranges that are read."""
        return (range_ for planned in self.tensors.values() for range_ in planned.source.ranges)


def plan_weights(saved: SavedEngine, dtype: str) -> ConversionPlan:
    """The entries of the model's state dict, floating ones in `dtype` ("keep": the model's).

    Trained parameters are read from their fp32 masters, unless the model's own weights have the
    target dtype. Extra state is unchanged if it is a tensor, and otherwise skipped, with a note.
    """
    plan = ConversionPlan()
    weights = saved.weights
    for name in dict.fromkeys([*weights, *saved.shapes]):
        own_dtype = weights[name].dtype if name in weights else "float32"
        target = own_dtype if dtype == "keep" else dtype
        needs_master = saved.stage == 3 or target != own_dtype or target == "float32"
        parameter = saved.source(name)
        if parameter in saved.shapes and needs_master:
            source = saved.master(parameter)
        else:
            source = saved.weight(name)
        plan.tensors[name] = PlannedTensor(source, _target_dtype(source.dtype, target))
    for name, value in saved.extra.items():
        if isinstance(value, TensorRef):
            plan.tensors[name] = PlannedTensor(StoredTensor.from_ref(value), value.dtype)
        else:
            plan.notes.append(f"skipped {name!r}: not a tensor, but {describe(value)}")
    plan.notes += [
        f"skipped {name!r}: a frozen parameter, whose weights are not in the files"
        for name in saved.omitted
    ]
    if not saved.has_parameter_names and saved.optimizer is not None:
        dtypes = {ref.dtype for ref in weights.values()} & {"float16", "bfloat16"}
        if dtypes and dtype not in ("keep", *dtypes):
            plan.notes.append(
                "at ZeRO 0 DeepSpeed does not record the names of the fp32 masters: the weights "
                f"are those that the model computes with, in {', '.join(dtypes)}"
            )
    return plan


def plan_ema(saved: SavedEngine, dtype: str) -> ConversionPlan:
    """As `plan_weights`, with the EMA weights of `engines.NAME.ema_decay` in place of the weights.

    Frozen parameters and buffers, which have no EMA, are unchanged. Raises CheckpointError if the
    checkpoint has no EMA weights.
    """
    plan = plan_weights(saved, dtype)
    has_ema = False
    for name, planned in plan.tensors.items():
        parameter = saved.sources.get(name, name)
        if parameter in saved.shapes and EMA in saved.state_keys(parameter):
            plan.tensors[name] = PlannedTensor(saved.moment(parameter, EMA), planned.dtype)
            has_ema = True
    if not has_ema:
        raise CheckpointError(
            f"{saved.directory} has no EMA weights: it was saved without engines.NAME.ema_decay"
        )
    return plan


def plan_optimizer(saved: SavedEngine) -> ConversionPlan:
    """Masters, moments and other state of every parameter, and settings of the groups.

    Raises CheckpointError if there is no optimizer state, if its parameters have no names, or if
    its shapes are not those of the parameters.
    """
    if saved.optimizer is None:
        raise CheckpointError(f"{saved.directory} has no optimizer state")
    if not saved.has_parameter_names:
        raise CheckpointError(
            f"{saved.directory}: at ZeRO 0 DeepSpeed does not record which parameter optimizer "
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
                f"{saved.directory}: {clashes[0]!r} is both a weight and optimizer state: convert "
                "them separately, with --what weights and --what optimizer"
            )
        plan.tensors |= state.tensors
        plan.groups, plan.values = state.groups, state.values
    return plan


def plan_file(content: TensorFile, dtype: str) -> ConversionPlan:
    """The tensors of a file."""
    plan = ConversionPlan(metadata=dict(content.metadata), notes=list(content.notes))
    for name, stored in content.tensors.items():
        target = stored.dtype if dtype == "keep" else dtype
        plan.tensors[name] = PlannedTensor(stored, _target_dtype(stored.dtype, target))
    left = {stored.dtype for stored in content.tensors.values()} - {*FLOATS}
    if dtype != "keep" and (left := sorted(name for name in left if name.startswith("float"))):
        plan.notes.append(f"not cast: tensors of {', '.join(left)}")
    return plan


def _target_dtype(dtype: str, target: str) -> str:
    return target if dtype in FLOATS and target in FLOATS else dtype


def select(plan: ConversionPlan, include: Sequence[str], exclude: Sequence[str]) -> None:
    """Keeps the tensors whose name contains a match of a pattern of `include` (if any), and of none
    of `exclude`. Raises HarnessError for a pattern that is invalid or matches no name.
    """
    included, excluded = (
        [_compiled(text) for text in include],
        [_compiled(text) for text in exclude],
    )
    patterns = included + excluded
    for pattern in patterns:
        if not any(pattern.search(name) for name in plan.tensors):
            hint = did_you_mean(pattern.pattern, plan.tensors)
            raise HarnessError(f"no tensor name matches {pattern.pattern!r}{hint}")
    plan.tensors = {
        name: planned
        for name, planned in plan.tensors.items()
        if (not included or any(p.search(name) for p in included))
        and not any(p.search(name) for p in excluded)
    }
    if not plan.tensors and patterns:
        raise HarnessError("--include and --exclude leave no tensor to write")


def rename(plan: ConversionPlan, renames: Sequence[str]) -> None:
    """Applies each "OLD=NEW" to all names, in order: every match of the pattern OLD becomes NEW.

    In optimizer state it changes the parameter's name, so that it still matches the parameter.
    Raises HarnessError for a pattern that is invalid, changes nothing, or leads to an empty name or
    two equal names.
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
            raise HarnessError(f"--rename {text}: no tensor name matches {old!r}")
        renamed: dict[str, PlannedTensor] = {}
        for name, new_name in new_names.items():
            if new_name == plan.tensors[name].prefix:
                raise HarnessError(f"--rename {text}: the new name of {name!r} is empty")
            if new_name in renamed:
                raise HarnessError(f"--rename {text}: two tensors would be named {new_name!r}")
            renamed[new_name] = plan.tensors[name]
        plan.tensors = renamed


def output_metadata(plan: ConversionPlan) -> dict[str, str]:
    """The metadata of the output. The optimizer's settings are JSON with the new parameter names,
    without parameters that have no tensor in the output."""
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
    settings = json.dumps({"param_groups": groups, "state": values}, default=_as_json)
    return plan.metadata | {OPTIMIZER: settings}


def _as_json(value: Any) -> Any:
    return value.item() if isinstance(value, NumpyScalar) else str(value)


def deduplicate(plan: ConversionPlan) -> None:
    """Keeps one of the tensors that are read from the same bytes; the others become its aliases."""
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
        return compile_pattern(text)
    except ValueError as error:
        raise HarnessError(str(error)) from None


def print_plan(plan: ConversionPlan, print_line: Callable[[str], object]) -> None:
    """Prints a line per tensor, and the total."""
    width = max(map(len, map(printable, [*plan.tensors, *plan.aliases])), default=0)
    for name, planned in plan.tensors.items():
        files = {range_.path for range_ in planned.source.ranges}
        old, new = planned.source.dtype, planned.dtype
        dtype = new if old == new else f"{old} -> {new}"
        print_line(
            f"{printable(name):<{width}}  {dtype:<20}  {list(planned.shape)!s:<16}  "
            f"{planned.nbytes:>14,} bytes from {len(files)} file{'s' * (len(files) != 1)}"
        )
    for name, stored_name in plan.aliases.items():
        print_line(f"{printable(name):<{width}}  = {printable(stored_name)}")
    print_line(f"{plan.count}, {plan.nbytes:,} bytes")
