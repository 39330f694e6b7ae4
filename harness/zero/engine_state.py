"""What a running DeepSpeed engine holds, and what can be set on it.

The functions take the DeepSpeed engine (`Engine.ds`), and use attributes that DeepSpeed does not
document; the comments name the files below its `runtime/` that define them.
"""

import math
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from harness import distributed
from harness.zero.file_trees import FileTrees
from harness.zero.layout import Shapes, flats, group_shapes
from harness.zero.norms import PlainGradients, StepNorm, is_rejected
from harness.zero.parameters import full_shape, is_expert, is_sharded, shard
from harness.zero.partition import Segment, shard_range

DEFAULT_CLIPPING = 1.0
"""DeepSpeed's `gradient_clipping` where the key is absent (constants.py)."""

Read = Callable[[str, int, int], Tensor]
"""`(name, start, stop)`: returns these elements of the flattened weight, (stop - start,)."""


def compute_dtype(ds: Any) -> torch.dtype:
    """The dtype that the model computes in."""
    if ds.bfloat16_enabled():
        return torch.bfloat16
    return torch.float16 if ds.fp16_enabled() else torch.float32


def optimizer_device(ds: Any) -> torch.device:
    """Where the optimizer steps: this rank's device, or the CPU with offload_optimizer."""
    return torch.device("cpu") if ds.zero_use_cpu_optimizer() else distributed.device()


def base_optimizer(ds: Any) -> Optimizer:
    """The torch optimizer: the one that DeepSpeed wraps, or the only one at fp32 stage 0."""
    return ds.basic_optimizer


def set_gradient_clipping(ds: Any, norm: float) -> None:
    """Sets the clipping norm where DeepSpeed reads it: in engine.py at fp32 stage 0, elsewhere in
    its optimizers."""
    ds._config.gradient_clipping = norm
    if hasattr(ds.optimizer, "clip_grad"):
        ds.optimizer.clip_grad = norm


def start_backward_timers(ds: Any) -> None:
    """Starts the timers of `wall_clock_breakdown` and `flops_profiler`, if they are enabled.

    DeepSpeed (engine.py, _backward_prologue) starts them when backward reaches an output of
    forward. At stage 3 a loss that a submodule has set never does, and stopping them fails.
    """
    timers = ds.engine_timers
    for name in (*timers.backward_timers, *timers.backward_inner_timers):
        ds.timers(name).start()


def loss_scale(ds: Any) -> float:
    """The fp16 loss scale; 1 in fp32 and bf16."""
    return float(_scaler(ds).cur_scale) if ds.fp16_enabled() else 1.0


def finds_loss_scale(ds: Any) -> bool:
    """Whether an overflow now would lower the loss scale: in fp16, above its smallest."""
    if not ds.fp16_enabled():
        return False
    scaler = _scaler(ds)  # whose names differ: fp16/unfused_optimizer.py, fp16/loss_scaler.py
    is_dynamic = getattr(scaler, "dynamic_loss_scale", getattr(scaler, "dynamic", False))
    smallest = getattr(scaler, "min_loss_scale", getattr(scaler, "min_scale", 1.0))
    return is_dynamic and scaler.cur_scale > smallest


def set_loss_scale(ds: Any, scale: float) -> None:
    """Sets the fp16 loss scale; a dynamic one continues from there."""
    _scaler(ds).cur_scale = scale


def _scaler(ds: Any) -> Any:
    """The object with the fp16 loss scale: a config at stage 0 (fp16/unfused_optimizer.py), above
    it a scaler."""
    return getattr(ds.optimizer, "loss_scale_config", None) or ds.optimizer.loss_scaler


@contextmanager
def gathered(tensor: Tensor) -> Iterator[None]:
    """In the block the tensor is complete, even a parameter that ZeRO stage 3 has sharded.

    Collective if it is sharded.
    """
    import deepspeed  # late: zero.startup patches it first

    with deepspeed.zero.GatheredParameters([tensor], enabled=is_sharded(tensor)):
        yield


@torch.no_grad()
def write_weights(ds: Any) -> None:
    """Writes the model's weights from their fp32 masters, as DeepSpeed does after a step.

    Collective.
    """
    optimizer = ds.optimizer
    if not has_masters(ds):
        return
    if hasattr(optimizer, "update_lp_params"):  # zero/stage_1_and_2.py, bf16_optimizer.py
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_partitioned_groups_flat"):  # zero/stage3.py
        optimizer._partition_all_parameters()
        for number in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        if persistent := optimizer.persistent_parameters:
            persistent[0].all_gather(persistent)
    else:  # 16 bits at stage 0: the masters of a group are a list, or one flat tensor
        flat = getattr(optimizer, "fp32_groups_flat", None)
        groups = optimizer.fp16_groups
        masters = optimizer.fp32_groups if flat is None else map(_unflattened, flat, groups)
        for weights, group in zip(groups, masters, strict=True):
            for weight, master in zip(weights, group, strict=True):
                weight.data.copy_(master)


def weights_are_finite(ds: Any) -> bool:
    """Whether all elements that this rank's optimizer steps are finite. Waits for the device.

    They are its shard of the fp32 masters, or at fp32 stage 0 the parameters themselves.
    """
    if hasattr(ds.optimizer, "fp32_partitioned_groups_flat"):
        masters = _without_padding(ds.optimizer)
    else:
        masters = (p for group in base_optimizer(ds).param_groups for p in group["params"])
    masters = [tensor.detach() for tensor in masters if tensor.numel()]
    # The largest magnitudes, of which NaN is the largest; a sum of squares could overflow.
    largest = torch._foreach_norm(masters, math.inf)  # pyright: ignore[reportPrivateImportUsage]
    return all(torch.stack(largest).isfinite().tolist()) if masters else True


def _without_padding(optimizer: Any) -> Iterator[Tensor]:
    """The masters of stage 3's shards (zero/stage3.py). What is behind the end of a parameter is
    whatever the memory held before, and may be NaN."""
    flats = optimizer.fp32_partitioned_groups_flat
    for flat, members in zip(flats, optimizer.fp16_groups, strict=True):
        offset = 0
        for parameter in members:
            size, rank = parameter.partition_numel(), dist.get_rank(parameter.ds_process_group)
            start, stop = shard_range(numel=parameter.ds_numel, size=size, rank=rank)
            yield flat[offset : offset + stop - start]
            offset += size


def _unflattened(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    parts = flat.split([tensor.numel() for tensor in like])
    return [part.view_as(tensor) for part, tensor in zip(parts, like, strict=True)]


def shapes_of(trees: FileTrees) -> list[Shapes]:
    """Rank 0's `layout.group_shapes` of what `collect` returned, on every rank. Collective."""
    models = [tree for tree in trees.values() if "module" in tree]
    return distributed.broadcast(group_shapes(models[0]) if models else [])


@torch.no_grad()
def fill_weight(tensor: Tensor, name: str, read: Read) -> None:
    """Overwrites a parameter or buffer; of a sharded parameter this rank's shard, and the full one
    too where DeepSpeed keeps it gathered (small ones persist)."""
    shape = full_shape(tensor)
    numel = shape.numel()
    own = shard(tensor)
    if own is not None:
        start, stop = shard_range(numel=numel, size=own.numel(), rank=distributed.global_rank())
        own.view(-1)[: stop - start].copy_(read(name, start, stop))
    if tensor.shape == shape:
        tensor.copy_(read(name, 0, numel).view(shape))


@torch.no_grad()
def fill_masters(
    ds: Any,
    module: Mapping[str, Tensor],
    shapes: list[Shapes],
    read: Read,
    names: Container[str],
) -> None:
    """Overwrites this rank's fp32 masters where they are separate from the parameters.

    `module`: the entries of the model's state dict. `shapes`: from `shapes_of`. `names`: of the
    parameters that are overwritten; other masters stay.
    """
    for segment, master in _masters(ds, module, shapes):
        if segment.name not in names:
            continue
        master.copy_(read(segment.name, segment.start, segment.stop).view(master.shape))


def _masters(
    ds: Any, module: Mapping[str, Tensor], shapes: list[Shapes]
) -> Iterator[tuple[Segment, Tensor]]:
    """This rank's stretches of the parameters, and the part of a master that each has."""
    rank, world = distributed.global_rank(), distributed.world_size()
    parameters = {id(tensor) for tensor in module.values()}
    for flat in flats(ds.optimizer.state_dict(), dict(module), shapes, rank, world):
        if id(flat.master) in parameters:
            continue
        for segment in filter(lambda segment: segment.length, flat.segments):
            is_all = segment.length == flat.master.numel()
            yield segment, flat.master if is_all else flat.master.view(-1)[segment.flat_slice]


def has_masters(ds: Any) -> bool:
    """Whether the optimizer steps masters, from which the model's weights are written."""
    return ds.basic_optimizer is not None and ds.optimizer is not ds.basic_optimizer


def watchable(ds: Any) -> dict[str, Tensor]:
    """The parameters that must not be changed in place, by name, and whose `_version` DeepSpeed's
    own writes do not change: those with masters, and all at stage 3, where they are empty between
    their uses. One that is alone in its group is the group's flat tensor, which DeepSpeed writes
    (zero/stage_1_and_2.py, bf16_optimizer.py)."""
    if zero_stage(ds) == 3:
        return dict(ds.module.named_parameters())
    if not has_masters(ds):
        return {}
    groups = getattr(ds.optimizer, "bit16_groups", getattr(ds.optimizer, "bf16_groups", ()))
    alone = {id(group[0]) for group in groups if len(group) == 1}
    parameters = ds.module.named_parameters()
    return {name: p for name, p in parameters if p.requires_grad and id(p) not in alone}


@contextmanager
def editing(module: nn.Module) -> Iterator[None]:
    """In the block the parameters are complete, and may be changed in place; afterwards all ranks
    have rank 0's, also if the block raises. Collective."""
    import deepspeed  # late: zero.startup patches it first

    parameters = [p for p in module.parameters() if not is_expert(p)]
    sharded = [p for p in parameters if is_sharded(p)]
    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0, enabled=bool(sharded)):
        try:
            yield
        finally:
            for parameter in parameters if not sharded else ():
                dist.broadcast(parameter.detach(), src=0)


@torch.no_grad()
def update_masters(ds: Any, shapes: list[Shapes]) -> None:
    """Takes over into the masters what was changed in the model's weights, and writes the weights.

    Elements that equal their master in the weights' dtype keep its precision. `shapes`: from
    `shapes_of`. Collective.
    """
    module = dict(ds.module.named_parameters())
    for segment, master in _masters(ds, module, shapes):
        part = _own_part(module[segment.name], segment).to(master.device).view(master.shape)
        is_same = master.to(part.dtype) == part
        master.copy_(torch.where(is_same, master, part.to(master.dtype)))
    write_weights(ds)


def _own_part(parameter: Tensor, segment: Segment) -> Tensor:
    """A stretch of a parameter; of a sharded one, within this rank's shard."""
    own, start = shard(parameter), segment.start
    if own is None:
        return parameter.detach().reshape(-1)[start : segment.stop]
    start -= distributed.global_rank() * own.numel()
    return own.view(-1)[start : start + segment.length]


def zero_stage(ds: Any) -> int:
    """The ZeRO stage, 0 to 3."""
    return ds.zero_optimization_stage()


def take_step(
    ds: Any, largest: float = math.inf, max_loss_scale: float | None = None
) -> Tensor | float:
    """DeepSpeed's optimizer step: skipped, at every stage, if a gradient is not finite, or if their
    norm is above `largest`.

    `max_loss_scale`: the largest fp16 loss scale of the next step; DeepSpeed has no limit. Returns
    the gradients' L2 norm before clipping; inf if one is not finite. Collective.
    """
    scale = loss_scale(ds)
    StepNorm.largest, StepNorm.found = largest * scale, None
    is_checked = zero_stage(ds) > 0 or compute_dtype(ds) != torch.float32  # by DeepSpeed
    if is_checked:
        ds.step()
    else:
        _take_plain_step(ds)
    if max_loss_scale is not None:
        set_loss_scale(ds, min(loss_scale(ds), max_loss_scale))
    norm = StepNorm.found
    if norm is None or not (ds.was_step_applied() or 0 <= float(norm) < math.inf):
        return math.inf
    return norm if scale == 1 else norm / scale


@contextmanager
def uncounted(ds: Any) -> Iterator[None]:
    """In the block DeepSpeed's steps, which are all skipped, do not count."""
    names = ("global_steps", "global_samples", "skipped_steps", "micro_steps")
    kept = {name: getattr(ds, name) for name in names}
    try:
        yield
    finally:
        for name, count in kept.items():
            setattr(ds, name, count)


def _take_plain_step(ds: Any) -> None:
    """In fp32 at stage 0: skips as at the other stages. Waits for the device."""
    StepNorm.gradients = PlainGradients(ds.module)
    try:
        with _overflowing(ds.optimizer) if is_rejected(StepNorm.gradients.norm) else nullcontext():
            ds.step()
    finally:
        StepNorm.gradients = None


@contextmanager
def _overflowing(optimizer: Optimizer) -> Iterator[None]:
    """In the block DeepSpeed's step skips as it does on an overflow (engine.py,
    `_take_model_step`): it drops the gradients, counts a skipped step, and holds the schedule."""
    replaced = {"step": lambda: None, "overflow": True}
    kept = {key: vars(optimizer)[key] for key in replaced if key in vars(optimizer)}
    vars(optimizer).update(replaced)
    try:
        yield
    finally:
        for key in replaced:
            del vars(optimizer)[key]
        vars(optimizer).update(kept)
