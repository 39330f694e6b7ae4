"""Which elements of which parameters are in the tensors that an optimizer steps.

Plain training steps the parameters themselves. DeepSpeed gives the optimizer other tensors,
*flats*: a clone of each parameter (stage 0 in 16 bits), or this rank's 1-D shard of many parameters
laid end to end (ZeRO). `locate` never guesses: it compares every element with the parameter's own
copy, the ranks compare their layouts, and an unknown layout is an error. Of harness only the
arithmetic is imported, and DeepSpeed is not.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from harness.zero.partition import Segment, full_segment, partition_segments, shard_segments


class ShardError(RuntimeError):
    """The layout is unknown or unsupported; the message says what to do. Raised on all ranks."""


@dataclass(frozen=True)
class Shard:
    """What one flat holds, on this rank and on the others that hold the rest of its parameters.

    Every rank has a segment of every parameter in the same order, possibly of length 0.
    """

    segments: tuple[tuple[Segment, ...], ...]
    """By rank of the group."""
    rank: int = 0
    """This rank in the group."""
    group: dist.ProcessGroup | None = None
    """The ranks that share the parameters; None where each has all of them."""
    device: torch.device | None = None
    """Of the tensors in the group's collectives."""

    @property
    def own(self) -> tuple[Segment, ...]:
        """The segments on this rank."""
        return self.segments[self.rank]


def locate(flats: Sequence[Tensor], parameters: Mapping[str, Tensor]) -> list[Shard]:
    """What each flat of one parameter group holds. `parameters`: those of the group, by name.

    Collective where the parameters are sharded. Raises ShardError.
    """
    first = _first_trainable(parameters) if parameters else None
    group = getattr(first, "ds_process_group", None) or getattr(first, "_dp_group", None)
    shards: list[Shard] = []
    failure: Exception | None = None
    try:
        shards = [_layout_of(flats, parameters, k, group) for k in range(len(flats))]
        for flat, shard in zip(flats, shards, strict=True):
            _verify(flat, shard, parameters)
    except Exception as error:  # any error: the other ranks must not wait for this one
        failure = error
    disagreement = ""
    if first is not None and group:
        disagreement = _disagreement(failure is None, shards, group, first.device)
    if failure:
        raise failure
    if disagreement:
        raise ShardError(disagreement)
    return shards


def _layout_of(
    flats: Sequence[Tensor], parameters: Mapping[str, Tensor], number: int, group: Any
) -> Shard:
    """The layout of flat `number`, by the attributes that each of DeepSpeed's optimizers sets."""
    flat, first = flats[number], _first_trainable(parameters)
    for name, parameter in parameters.items():
        if parameter is flat:
            return _full(name, flat)
    if hasattr(first, "_z3_optimizer"):
        return _stage_3(flat, parameters, group)
    if hasattr(first, "_dp_group"):
        return _stages_1_and_2(flat, parameters, group)
    stepped = {name: p for name, p in parameters.items() if p.requires_grad and p.numel()}
    if [flat.shape for flat in flats] == [p.shape for p in stepped.values()]:
        return _clone(flat, *list(stepped.items())[number])
    raise ShardError(
        f"parameter {next(iter(parameters))!r}: the optimizer was given a tensor of shape "
        f"{tuple(flat.shape)} to step, in an unknown layout (known: plain parameters; DeepSpeed's "
        "ZeRO stages 0 to 3, BF16_Optimizer): pass the optimizer to deepspeed.initialize, or step "
        "the parameters that it was built with"
    )


def _first_trainable(parameters: Mapping[str, Tensor]) -> Tensor:
    """DeepSpeed does not mark those that are frozen. The first of all if all are."""
    trainable = (p for p in parameters.values() if p.requires_grad)
    return next(trainable, next(iter(parameters.values())))


def _full(name: str, flat: Tensor) -> Shard:
    return Shard(((full_segment(name=name, numel=flat.numel()),),))


def _clone(flat: Tensor, name: str, parameter: Tensor) -> Shard:
    """FP16_UnfusedOptimizer (stage 0): a float32 clone of every parameter, in order."""
    if parameter.dtype == torch.float16:
        raise ShardError(
            f"parameter {name!r}: fp16 at ZeRO stage 0 divides the gradients by a loss scale that "
            "was never applied (DeepSpeed #8393): use stage 1, or bf16"
        )
    return _full(name, flat)


def _stages_1_and_2(flat: Tensor, parameters: Mapping[str, Tensor], group: Any) -> Shard:
    """DeepSpeedZeroOptimizer and BF16_Optimizer: equal parts of the group laid end to end.

    The parameters are views into that one tensor: their storage offsets are their offsets in it,
    for any order (round_robin_gradients) and any gaps (parameter_alignment).
    """
    trainable = {n: p for n, p in parameters.items() if p.requires_grad and p.numel()}
    world = dist.get_world_size(group)
    storages = {p.untyped_storage().data_ptr() for p in trainable.values()}
    for name, p in trainable.items():
        elements = p.untyped_storage().nbytes() // p.element_size()
        if len(storages) > 1 or elements != world * flat.numel() or not p.is_contiguous():
            raise ShardError(
                f"parameter {name!r}: expected a view into the {world} x {flat.numel()} elements "
                f"that ZeRO shards, found a storage of {elements} elements ({len(storages)} "
                "storages in its parameter group): do not move or replace parameters, or change "
                "the parameter groups, after deepspeed.initialize (offload_states)"
            )
        if getattr(getattr(p, "_zero_optimizer", None), "elastic_checkpoint", False):
            raise _elastic(name)
    ordered = sorted(trainable.items(), key=lambda item: item[1].storage_offset())
    offsets = {name: int(p.storage_offset()) for name, p in ordered}
    sizes = {name: p.numel() for name, p in ordered}

    def segments(rank: int) -> list[Segment]:
        return partition_segments(offsets=offsets, sizes=sizes, size=flat.numel(), rank=rank)

    return _sharded(segments, group, ordered[0][1].device)


def _stage_3(flat: Tensor, parameters: Mapping[str, Tensor], group: Any) -> Shard:
    """DeepSpeedZeroOptimizer_Stage3: the same part of every parameter of a sub-group, padded."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    first: Any = _first_trainable(parameters)
    zero = first._z3_optimizer
    if zero.swap_optimizer:
        raise ShardError(
            "zero_optimization.offload_optimizer.device = 'nvme' supports only optimizer state of "
            "the parameters' size: set it to 'cpu'"
        )
    if zero.offload_optimizer and zero.partial_offload != 1.0:
        raise ShardError(
            f"zero_optimization.offload_optimizer.ratio = {zero.partial_offload}: DeepSpeed "
            "updates the rest with its own AdamW: set it to 1.0"
        )
    if zero.elastic_checkpoint:
        raise _elastic(next(iter(parameters)))
    numbers = [k for k, f in enumerate(zero.fp32_partitioned_groups_flat) if f is flat]
    members = zero.fp16_groups[numbers[0]] if numbers else []
    if not members or any(id(p) not in names for p in members):
        raise ShardError(
            f"parameter {next(iter(parameters))!r}: the tensor to step does not belong to a "
            "sub-group of ZeRO stage 3 with parameters of this parameter group only: do not change "
            "the parameter groups after deepspeed.initialize"
        )
    sizes = {names[id(p)]: int(p.ds_numel) for p in members}
    world = dist.get_world_size(group)

    def segments(rank: int) -> list[Segment]:
        return shard_segments(sizes=sizes, world=world, rank=rank)

    return _sharded(segments, group, first.device)


def _sharded(segments: Callable[[int], list[Segment]], group: Any, device: torch.device) -> Shard:
    """The segments of all ranks."""
    by_rank = tuple(tuple(segments(rank)) for rank in range(dist.get_world_size(group)))
    return Shard(by_rank, dist.get_rank(group), group, device)


def _elastic(name: str) -> ShardError:
    return ShardError(
        f"parameter {name!r}: zero_optimization.elastic_checkpoint supports only optimizer state "
        "of the parameters' size: set it to false"
    )


def _verify(flat: Tensor, shard: Shard, parameters: Mapping[str, Tensor]) -> None:
    """Raises ShardError unless every segment, rounded, equals the parameter's own elements."""
    for segment in shard.own:
        parameter: Any = parameters[segment.name]
        if parameter is flat or not segment.length:
            continue
        if hasattr(parameter, "ds_tensor"):  # at stage 3 only this rank's part of it exists
            own = parameter.ds_tensor.data.flatten()[: segment.length]
        else:
            own = parameter.data.flatten()[segment.start : segment.stop]
        own = own.to(flat.device)
        stepped = flat.data.flatten()[segment.flat_slice].to(own.dtype)
        if own.shape != stepped.shape or not torch.equal(own.nan_to_num(), stepped.nan_to_num()):
            raise ShardError(
                f"parameter {segment.name!r}: expected its elements {segment.start} to "
                f"{segment.stop} at offset {segment.offset} of the tensor to step (of "
                f"{flat.numel()} elements), found other values: this version of DeepSpeed may use "
                "a new layout, or the weights were changed without their fp32 masters"
            )


def _disagreement(
    succeeded: bool, shards: Sequence[Shard], group: Any, device: torch.device
) -> str:
    """The error of this rank if another one failed, or if the layouts differ; empty if neither."""
    layout = zlib.crc32(repr([shard.segments for shard in shards]).encode())
    answers = torch.tensor([succeeded, layout, -layout], dtype=torch.int64, device=device)
    dist.all_reduce(answers, dist.ReduceOp.MIN, group=group)
    all_succeeded, least, most = answers.tolist()
    if not all_succeeded:
        return "another rank failed to locate its shards: see its error"
    if least != -most:
        return "the ranks disagree on the layout of their shards: did they build the same model?"
    return ""
