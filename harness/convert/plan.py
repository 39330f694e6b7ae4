"""What a conversion writes: for each tensor its name, its dtype, and the bytes it is made of.

Planning reads no tensor. The names are those of the model's state dict; the optimizer's state goes
by `optimizer.KEY.NAME`, where KEY is "master" (fp32 weights), "exp_avg", "step" and so on.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.errors import CheckpointError, HarnessError, did_you_mean
from harness.formats.dtypes import FLOATS, SIZES
from harness.formats.pt_reader import TensorRef
from harness.formats.sources import ByteRange, StoredTensor, source
from harness.formats.tensor_file import FlatFile
from harness.zero.reader import SavedEngine

OPTIMIZER = "optimizer"
EMA = "ema"
"""Key of the average in the optimizer's state: `harness.engine.ema.KEY`, which needs torch."""


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the output: a source, and the dtype that it is written in."""

    source: StoredTensor
    dtype: str
    key: str = ""
    """What of a parameter's optimizer state it is: "master", "exp_avg" ... Of weights empty."""
    parameter: str = ""
    """Whose state it is, by the name in the checkpoint."""

    @property
    def prefix(self) -> str:
        """What comes before the parameter's name in its own."""
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
    """Tensors by name, in the order of the output."""

    tensors: dict[str, PlannedTensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    """Further names of tied tensors, and the ones that they are stored under."""
    groups: list[Any] = field(default_factory=list)
    """Of the optimizer: settings, and `params`, the names of the group's parameters."""
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    """State of the optimizer that is no tensor, by key and parameter."""
    metadata: dict[str, str] = field(default_factory=dict)
    """What the source says of itself."""
    notes: list[str] = field(default_factory=list)
    """What the user should know: where the output is less than he may expect."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the output."""
        return sum(planned.nbytes for planned in self.tensors.values())

    def ranges(self) -> Iterable[ByteRange]:
        """All that is read."""
        return (piece for planned in self.tensors.values() for piece in planned.source.ranges)


def weights(saved: SavedEngine, dtype: str) -> ConversionPlan:
    """The entries of the model's state dict, floating ones in `dtype`; "keep": the model's own.

    Trained parameters come from their fp32 masters, except where the model's own copy already is
    what is asked for. Extra state that is a tensor stays as it is; other is noted, and left out.
    """
    plan = ConversionPlan()
    own: Mapping[str, TensorRef] = saved.model["module"] | saved.experts
    for name in dict.fromkeys([*own, *saved.shapes]):
        computed = own[name].dtype if name in own else "float32"
        target = computed if dtype == "keep" else dtype
        kept = saved.shared.get(name, name)
        if kept in saved.shapes and (saved.stage == 3 or target != computed or target == "float32"):
            found = saved.master(kept)
        else:
            found = saved.weight(name)
        plan.tensors[name] = PlannedTensor(found, _target(found.dtype, target))
    for name, value in saved.extra.items():
        if isinstance(value, TensorRef):
            plan.tensors[name] = PlannedTensor(source(value), value.dtype)
        else:
            plan.notes.append(f"{name!r} is no tensor, and is left out: a {type(value).__name__}")
    if not saved.has_parameter_names and saved.optimizer is not None:
        kinds = {ref.dtype for ref in own.values()} & {"float16", "bfloat16"}
        if kinds and dtype not in ("keep", *kinds):
            plan.notes.append(
                "DeepSpeed names no fp32 masters at ZeRO 0: the weights are the "
                f"{', '.join(kinds)} ones that the model computes with"
            )
    return plan


def averages(saved: SavedEngine, dtype: str) -> ConversionPlan:
    """As `weights`, with the average of the weights where one is kept: `engines.NAME.ema_decay`.

    What is not averaged, frozen parameters and buffers, is as it is. Raises CheckpointError if
    nothing is.
    """
    plan = weights(saved, dtype)
    is_kept = False
    for name, planned in plan.tensors.items():
        kept = saved.shared.get(name, name)
        if kept in saved.shapes and EMA in saved.state_keys(kept):
            plan.tensors[name] = PlannedTensor(saved.moment(kept, EMA), planned.dtype)
            is_kept = True
    if not is_kept:
        raise CheckpointError(
            f"{saved.directory}: no average of the weights here: engines.NAME.ema_decay keeps one"
        )
    return plan


def optimizer(saved: SavedEngine) -> ConversionPlan:
    """Masters, moments and further state of every parameter, and settings of the groups.

    Raises CheckpointError if there is none, it tells no names, or its state has other shapes than
    the parameters.
    """
    if saved.optimizer is None:
        raise CheckpointError(f"{saved.directory}: no state of an optimizer here")
    if not saved.has_parameter_names:
        raise CheckpointError(
            f"{saved.directory}: at ZeRO 0 DeepSpeed does not say which parameter the optimizer's "
            "state belongs to"
        )
    saved.check_moments()
    plan = ConversionPlan()
    for name in saved.shapes:
        found = {"master": saved.master(name)}
        found |= {key: saved.moment(name, key) for key in saved.state_keys(name)}
        for key, value in saved.scalars(name).items():
            if isinstance(value, TensorRef):
                found[key] = source(value)
            else:
                plan.values.setdefault(key, {})[name] = value
        for key, tensor in found.items():
            planned = PlannedTensor(tensor, tensor.dtype, key, name)
            plan.tensors[planned.prefix + name] = planned
    plan.groups = [
        group | {"params": [name for name in saved.shapes if saved.group_of(name) == number]}
        for number, group in enumerate(saved.groups)
    ]
    return plan


def of_engine(saved: SavedEngine, what: str, dtype: str) -> ConversionPlan:
    """`what`: "weights", "ema", "optimizer" or "all"."""
    if what == "ema":
        return averages(saved, dtype)
    plan = weights(saved, dtype) if what in ("weights", "all") else ConversionPlan()
    if what in ("optimizer", "all"):
        further = optimizer(saved)
        if twice := sorted(plan.tensors.keys() & further.tensors.keys()):
            raise CheckpointError(
                f"{saved.directory}: {twice[0]!r} is both a weight and state of the optimizer: "
                "convert them one by one, with --what weights and --what optimizer"
            )
        plan.tensors |= further.tensors
        plan.groups, plan.values = further.groups, further.values
    return plan


def of_file(content: FlatFile, dtype: str) -> ConversionPlan:
    """The tensors of files that hold nothing else."""
    plan = ConversionPlan(metadata=dict(content.metadata))
    for name, found in content.tensors.items():
        target = found.dtype if dtype == "keep" else dtype
        plan.tensors[name] = PlannedTensor(found, _target(found.dtype, target))
    return plan


def _target(dtype: str, wanted: str) -> str:
    return wanted if dtype in FLOATS and wanted in FLOATS else dtype


def select(plan: ConversionPlan, include: Sequence[str], exclude: Sequence[str]) -> None:
    """Keeps the tensors whose name matches a pattern of `include`, if there is one, and none of
    `exclude`. Raises HarnessError for a pattern that is none, or that nothing matches.
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
    """Applies "OLD=NEW" to every name, in order: OLD is a pattern, of which each match becomes NEW.

    Of the optimizer's state the name is that of the parameter, so both go by the same names.
    Raises HarnessError for what is no pattern, changes nothing, or gives two tensors one name or a
    tensor none.
    """
    for text in renames:
        old, equals, new = text.partition("=")
        if not equals or not old:
            raise HarnessError(f"--rename {text}: expected OLD=NEW")
        pattern = _compiled(old)
        try:
            names = {
                name: p.prefix + pattern.sub(new, name.removeprefix(p.prefix))
                for name, p in plan.tensors.items()
            }
        except (re.error, IndexError) as error:
            raise HarnessError(f"--rename {text}: {error}") from None
        if all(name == other for name, other in names.items()):
            raise HarnessError(f"--rename {text}: no name has {old!r} in it")
        renamed: dict[str, PlannedTensor] = {}
        for name, other in names.items():
            if other == plan.tensors[name].prefix:
                raise HarnessError(f"--rename {text}: nothing would be left of {name!r}")
            if other in renamed:
                raise HarnessError(f"--rename {text}: two tensors would be named {other!r}")
            renamed[other] = plan.tensors[name]
        plan.tensors = renamed


def metadata(plan: ConversionPlan) -> dict[str, str]:
    """What is written beside the tensors. The settings of the optimizer are JSON, with the names
    that the parameters have come to have; those that have no tensor left are not in it."""
    if not plan.groups:
        return plan.metadata
    states = [(name, planned) for name, planned in plan.tensors.items() if planned.key]
    names = {planned.parameter: name.removeprefix(planned.prefix) for name, planned in states}
    groups = [
        group | {"params": [names[name] for name in group["params"] if name in names]}
        for group in plan.groups
    ]
    values = {
        key: {names[name]: value for name, value in found.items() if name in names}
        for key, found in plan.values.items()
    }
    settings = json.dumps({"param_groups": groups, "state": values}, default=str)
    return plan.metadata | {OPTIMIZER: settings}


def tie(plan: ConversionPlan) -> None:
    """Keeps one of the tensors that are the same bytes; the others become its aliases."""
    kept: dict[Any, str] = {}
    for name, planned in list(plan.tensors.items()):
        strided = planned.source.strided
        view = (strided.stride, strided.offset) if strided else ()
        key = (planned.source.ranges, planned.dtype, planned.shape, view)
        if not planned.source.ranges:
            continue
        if key in kept:
            plan.aliases[name] = kept[key]
            del plan.tensors[name]
        else:
            kept[key] = name


def _compiled(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise HarnessError(f"{text!r} is no regular expression: {error}") from None


def table(plan: ConversionPlan, put: Callable[[str], object]) -> None:
    """Prints what would be written, a line for each tensor."""
    width = max(map(len, [*plan.tensors, *plan.aliases]), default=0)
    for name, planned in plan.tensors.items():
        files = {piece.path for piece in planned.source.ranges}
        was = planned.source.dtype
        change = planned.dtype if was == planned.dtype else f"{was} -> {planned.dtype}"
        put(
            f"{name:<{width}}  {change:<20}  {list(planned.shape)!s:<16}  "
            f"{planned.nbytes:>14,} bytes from {len(files)} file{'s' * (len(files) != 1)}"
        )
    for name, kept in plan.aliases.items():
        put(f"{name:<{width}}  = {kept}")
    put(f"{len(plan.tensors)} tensors, {plan.nbytes:,} bytes")
