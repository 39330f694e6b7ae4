"""Which elements of which parameters are in the tensors that an optimizer is given to step.

Plain training steps the parameters themselves. DeepSpeed gives the optimizer other tensors,
*flats*: a clone of each parameter (stage 0 in 16 bits), or this rank's 1-D shard of many parameters
laid end to end (ZeRO). `locate` finds out through the parameters themselves, never by guessing: it
compares every element with the parameter's own copy, the ranks agree on what they found, and what
it does not know it refuses. Of harness only the arithmetic is imported, and DeepSpeed is not.
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
    """What one flat holds, here and on the other ranks that hold the rest of its parameters.

    Every rank has a segment of every parameter in the same order, if only one of no length.
    """

    segments: tuple[tuple[Segment, ...], ...]
    """By rank of the group."""
    rank: int = 0
    """This rank in the group."""
    group: dist.ProcessGroup | None = None
    """The ranks that share the parameters; None where each has all of them."""
    device: torch.device | None = None
    """Where the group's collectives find their tensors."""

    @property
    def own(self) -> tuple[Segment, ...]:
        """The segments on this rank."""
        return self.segments[self.rank]


def locate(flats: Sequence[Tensor], parameters: Mapping[str, Tensor]) -> list[Shard]:
    """What each flat of one parameter group holds. `parameters`: those that the group was made of.

    Collective where the parameters are sharded. Raises ShardError.
    """
    some = next(iter(parameters.values()), None)
    group = getattr(some, "ds_process_group", None) or getattr(some, "_dp_group", None)
    found: list[Shard] = []
    failure: Exception | None = None
    try:
        found = [_known(flats, parameters, k, group) for k in range(len(flats))]
        for flat, shard in zip(flats, found, strict=True):
            _verify(flat, shard, parameters)
    except Exception as error:  # whatever it is, the others must not wait for this rank
        failure = error
    others = (
        _agree(failure is None, found, group, some.device) if some is not None and group else ""
    )
    if failure:
        raise failure
    if others:
        raise ShardError(others)
    return found


def _known(
    flats: Sequence[Tensor], parameters: Mapping[str, Tensor], number: int, group: Any
) -> Shard:
    """The layout of flat `number`, by the marks that each of DeepSpeed's optimizers leaves."""
    flat, some = flats[number], next(iter(parameters.values()))
    for name, parameter in parameters.items():
        if parameter is flat:
            return _whole(name, flat)
    if hasattr(some, "_z3_optimizer"):
        return _stage_3(flat, parameters, group)
    if hasattr(some, "_dp_group"):
        return _stages_1_and_2(flat, parameters, group)
    stepped = {name: p for name, p in parameters.items() if p.requires_grad and p.numel()}
    if [flat.shape for flat in flats] == [p.shape for p in stepped.values()]:
        return _clone(flat, *list(stepped.items())[number])
    raise ShardError(
        f"parameter {next(iter(parameters))!r}: the optimizer is given a tensor of shape "
        f"{tuple(flat.shape)} to step, in none of the layouts known here (plain parameters; "
        "DeepSpeed's ZeRO stages 0 to 3, BF16_Optimizer): hand the optimizer to "
        "deepspeed.initialize, or step the parameters that it was built with"
    )


def _whole(name: str, flat: Tensor) -> Shard:
    return Shard(((full_segment(name=name, numel=flat.numel()),),))


def _clone(flat: Tensor, name: str, parameter: Tensor) -> Shard:
    """FP16_UnfusedOptimizer (stage 0): a float32 clone of every parameter, in order."""
    if parameter.dtype == torch.float16:
        raise ShardError(
            f"parameter {name!r}: fp16 at ZeRO stage 0 divides the gradients by a loss scale that "
            "was never applied (DeepSpeed #8393): use stage 1, or bf16"
        )
    return _whole(name, flat)


def _stages_1_and_2(flat: Tensor, parameters: Mapping[str, Tensor], group: Any) -> Shard:
    """DeepSpeedZeroOptimizer and BF16_Optimizer: equal parts of the group laid end to end.

    The parameters are views into that one tensor: their storage offsets are their places, whatever
    the order (round_robin_gradients) and the gaps (parameter_alignment).
    """
    ours = {n: p for n, p in parameters.items() if p.requires_grad and p.numel()}
    world = dist.get_world_size(group)
    storages = {p.untyped_storage().data_ptr() for p in ours.values()}
    for name, p in ours.items():
        elements = p.untyped_storage().nbytes() // p.element_size()
        if len(storages) > 1 or elements != world * flat.numel() or not p.is_contiguous():
            raise ShardError(
                f"parameter {name!r}: expected a view into {world} x {flat.numel()} elements, that "
                f"ZeRO shards; found a storage of {elements} elements ({len(storages)} storages in "
                "its parameter group): do not move or replace parameters after "
                "deepspeed.initialize (offload_states), and keep the parameter groups as they were"
            )
        if getattr(getattr(p, "_zero_optimizer", None), "elastic_checkpoint", False):
            raise _elastic(name)
    ordered = sorted(ours.items(), key=lambda item: item[1].storage_offset())
    places = {name: int(p.storage_offset()) for name, p in ordered}
    sizes = {name: p.numel() for name, p in ordered}

    def segments(rank: int) -> list[Segment]:
        return partition_segments(places=places, sizes=sizes, size=flat.numel(), rank=rank)

    return _sharded(segments, group, ordered[0][1].device)


def _stage_3(flat: Tensor, parameters: Mapping[str, Tensor], group: Any) -> Shard:
    """DeepSpeedZeroOptimizer_Stage3: of every parameter of a sub-group the same part, padded."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    some: Any = next(iter(parameters.values()))
    zero = some._z3_optimizer
    if zero.swap_optimizer:
        raise ShardError(
            "the optimizer's state is to be offloaded to NVMe, which keeps room for tensors of the "
            "parameters' size only: set zero_optimization.offload_optimizer.device to 'cpu'"
        )
    if zero.offload_optimizer and zero.partial_offload != 1.0:
        raise ShardError(
            f"offload_optimizer.ratio is {zero.partial_offload}: DeepSpeed steps the other part "
            "with an AdamW of its own; set it to 1.0"
        )
    if zero.elastic_checkpoint:
        raise _elastic(next(iter(parameters)))
    numbers = [k for k, f in enumerate(zero.fp32_partitioned_groups_flat) if f is flat]
    members = zero.fp16_groups[numbers[0]] if numbers else []
    if not members or any(id(p) not in names for p in members):
        raise ShardError(
            f"parameter {next(iter(parameters))!r}: ZeRO stage 3 has no sub-group of this "
            "parameter group's parameters for the tensor that is to be stepped: keep the parameter "
            "groups as they were at deepspeed.initialize"
        )
    sizes = {names[id(p)]: int(p.ds_numel) for p in members}
    world = dist.get_world_size(group)

    def segments(rank: int) -> list[Segment]:
        return shard_segments(sizes=sizes, world=world, rank=rank)

    return _sharded(segments, group, some.device)


def _sharded(segments: Callable[[int], list[Segment]], group: Any, device: torch.device) -> Shard:
    """The segments of all ranks."""
    by_rank = tuple(tuple(segments(rank)) for rank in range(dist.get_world_size(group)))
    return Shard(by_rank, dist.get_rank(group), group, device)


def _elastic(name: str) -> ShardError:
    return ShardError(
        f"parameter {name!r}: zero_optimization.elastic_checkpoint can only save state of the "
        "parameters' size: switch it off"
    )


def _verify(flat: Tensor, shard: Shard, parameters: Mapping[str, Tensor]) -> None:
    """Raises ShardError unless every piece is, rounded, what the parameter itself holds."""
    for piece in shard.own:
        parameter: Any = parameters[piece.name]
        if parameter is flat or not piece.length:
            continue
        if hasattr(parameter, "ds_tensor"):  # at stage 3 only this rank's part of it exists
            own = parameter.ds_tensor.data.flatten()[: piece.length]
        else:
            own = parameter.data.flatten()[piece.start : piece.start + piece.length]
        own = own.to(flat.device)
        here = flat.data.flatten()[piece.offset : piece.offset + piece.length].to(own.dtype)
        if own.shape != here.shape or not torch.equal(own.nan_to_num(), here.nan_to_num()):
            raise ShardError(
                f"parameter {piece.name!r}: elements {piece.start} to {piece.start + piece.length} "
                f"were expected at {piece.offset} of the tensor of {flat.numel()} that is to be "
                "stepped, and others were found: this version of DeepSpeed may lay out parameters "
                "in a new way, or the weights were changed without their fp32 masters"
            )


def _agree(succeeded: bool, found: Sequence[Shard], group: Any, device: torch.device) -> str:
    """The error of this rank if another one failed, or if the layouts differ; empty if neither."""
    layout = zlib.crc32(repr([shard.segments for shard in found]).encode())
    answers = torch.tensor([succeeded, layout, -layout], dtype=torch.int64, device=device)
    dist.all_reduce(answers, dist.ReduceOp.MIN, group=group)
    all_succeeded, least, most = answers.tolist()
    if not all_succeeded:
        return "another rank does not know the layout of its shards; its own message says why"
    if least != -most:
        return "the ranks disagree on the layout of their shards: did they build the same model?"
    return ""
