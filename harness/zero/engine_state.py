"""What a running DeepSpeed engine holds, and what can be set on it.

The functions take the DeepSpeed engine (`Engine.ds`), and use attributes that DeepSpeed does not
document; the comments name the files below its `runtime/` that define them.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from harness import distributed
from harness.zero.layout import PARAMETER_NAMES, Shapes, Tree, flats, group_shapes
from harness.zero.parameters import full_shape, is_expert, is_sharded, shard
from harness.zero.partition import shard_range

FileTrees = dict[str, Tree]
"""The files of a rank: trees of tensors and plain values, by path relative to the checkpoint."""

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


def loss_scale(ds: Any) -> float:
    """The fp16 loss scale; 1 in fp32 and bf16."""
    return float(_scaler(ds).cur_scale) if ds.fp16_enabled() else 1.0


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
    if isinstance(optimizer, Optimizer):
        return  # the weights are their own masters
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
    masters = getattr(ds.optimizer, "fp32_partitioned_groups_flat", None)  # zero/stage3.py
    if masters is None:
        masters = [p for group in base_optimizer(ds).param_groups for p in group["params"]]
    masters = [tensor.detach() for tensor in masters if tensor.numel()]
    # The largest magnitudes, of which NaN is the largest; a sum of squares could overflow.
    largest = torch._foreach_norm(masters, math.inf)  # pyright: ignore[reportPrivateImportUsage]
    return all(torch.stack(largest).isfinite().tolist()) if masters else True


def _unflattened(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    parts = flat.split([tensor.numel() for tensor in like])
    return [part.view_as(tensor) for part, tensor in zip(parts, like, strict=True)]


def collect(ds: Any, name: str, parameter_names: list[list[str]]) -> FileTrees:
    """The trees that DeepSpeed would write for this rank, under `name/`, without writing them.

    The trees refer to the live tensors. `parameter_names`, by parameter group, are added: DeepSpeed
    records none at ZeRO 0. Collective.
    """
    collector = _Collector()
    own_engine = ds.checkpoint_engine
    ds.checkpoint_engine = collector
    ds._copy_recovery_script = lambda directory: None  # `zero_to_fp32.py` and the like
    names = {PARAMETER_NAMES: parameter_names}
    try:
        ds.save_checkpoint(".", tag=name, client_state=names, save_latest=False)
    finally:
        ds.checkpoint_engine = own_engine
    return collector.trees


class _Collector:
    """In place of DeepSpeed's checkpoint engine: keeps the trees, and touches no disk."""

    def __init__(self) -> None:
        self.trees: FileTrees = {}

    def save(self, state_dict: Any, path: str) -> None:
        self.trees[str(Path(path))] = state_dict

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def create(self, info: Any) -> None:
        pass

    def commit(self, info: Any) -> bool:
        return True

    def is_decoupled(self) -> bool:
        return False

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        return dp_rank == 0

    def preserves_storage_sharing(self) -> bool:
        return True


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
def fill_masters(ds: Any, module: Mapping[str, Tensor], shapes: list[Shapes], read: Read) -> None:
    """Overwrites this rank's fp32 masters where they are separate from the parameters.

    `module`: the entries of the model's state dict. `shapes`: from `shapes_of`.
    """
    rank, world = distributed.global_rank(), distributed.world_size()
    parameters = {id(tensor) for tensor in module.values()}
    for flat in flats(ds.optimizer.state_dict(), dict(module), shapes, rank, world):
        if id(flat.master) in parameters:
            continue
        for segment in filter(lambda segment: segment.length, flat.segments):
            part = read(segment.name, segment.start, segment.stop)
            if segment.length == flat.master.numel():
                flat.master.copy_(part.view(flat.master.shape))
            else:
                flat.master.view(-1)[segment.flat_slice].copy_(part)


def zero_stage(ds: Any) -> int:
    """The ZeRO stage, 0 to 3."""
    return ds.zero_optimization_stage()


def take_step(ds: Any) -> Tensor | float:
    """DeepSpeed's optimizer step: skipped, at every stage, if a gradient is not finite.

    Returns the gradients' L2 norm before clipping; inf if the step was skipped. Collective.
    """
    if zero_stage(ds) or compute_dtype(ds) != torch.float32:
        ds.step()
        return ds.get_global_grad_norm()
    norm = _plain_grad_norm(ds.module)
    if _is_finite_everywhere(norm, ds.module):
        ds.step()
        return norm
    with _overflowing(ds.optimizer):
        ds.step()
    return math.inf


def _plain_grad_norm(module: nn.Module) -> Tensor:
    """The norm in fp32 at stage 0: there DeepSpeed neither wraps the optimizer nor computes it."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def _is_finite_everywhere(norm: Tensor, module: nn.Module) -> bool:
    """Whether all ranks may step. Waits for the device. Ranks reduce to the same gradients, and so
    to the same answer, except those of experts."""
    is_finite = bool(norm.isfinite())
    if any(map(is_expert, module.parameters())):
        return not distributed.all_reduce_max([not is_finite])[0]
    return is_finite


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
