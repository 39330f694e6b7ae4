"""Builds models in shards, at ZeRO stage 3: no rank ever holds all weights.

`deepspeed.zero.Init` (partition_parameters.py) shards the parameters of every module when its
`__init__` is over. What a model does to them later, like an outer module that initializes the
weights of inner ones, would have no effect: they are empty. Here they are gathered when touched.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from harness.zero.parameters import is_sharded, make_contiguous

MOST_GATHERED = 2**30
"""Bytes of weights that stay gathered after they were touched."""


def build_in_shards(build: Callable[[], Any], settings: dict[str, Any]) -> Any:
    """What `build` returns, a model with the weights that it has without ZeRO, in shards.

    `settings`: DeepSpeed's JSON. Collective: every rank builds the same model; the weights are
    those of rank 0.
    """
    # No overrides: weights are initialized in their own dtype and on the CPU, as without ZeRO.
    context = _sharding_class()(config_dict_or_path=settings, tensor_overrides=())
    touched = _Gathering()
    with context, touched:
        model = build()
        with torch._C.DisableTorchFunction():
            touched.shard_all()
    if isinstance(model, nn.Module):
        make_contiguous(model.parameters())
        context._convert_to_zero_parameters(model.parameters())
        cast_parameters(model, context.dtype)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(context.local_device)  # as DeepSpeed does without shards
    return model


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts floating-point parameters, sharded or not, as DeepSpeed does if none is sharded."""
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        parameter.data = parameter.data.to(dtype)
        own: Any = getattr(parameter, "ds_tensor", None)
        if own is not None and own.dtype != dtype:
            is_pinned = own.is_pinned()
            own.data = own.data.to(dtype)
            if is_pinned:
                own.data = own.data.pin_memory()


def _sharding_class() -> Any:
    """`zero.Init`, whose own work with a parameter does not gather it."""
    import deepspeed  # late: zero.startup patches it first

    class ShardedInit(deepspeed.zero.Init):
        def _post_init_method(self, module: nn.Module) -> None:
            with torch._C.DisableTorchFunction():
                make_contiguous(module.parameters(recurse=False))
                super()._post_init_method(module)

        def _convert_to_deepspeed_param(self, param: Any) -> None:
            super()._convert_to_deepspeed_param(param)
            for name in ("all_gather", "partition"):  # they touch it while it is incomplete
                setattr(param, name, _untouched(getattr(param, name)))

    return ShardedInit


def _untouched(function: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return call


class _Gathering(TorchFunctionMode):
    """Gathers every sharded parameter that torch is called with, and shards it again later."""

    def __init__(self) -> None:
        super().__init__()
        self._gathered: list[Any] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        touched = tree_leaves((args, kwargs))
        missing: list[Any] = [p for p in touched if isinstance(p, nn.Parameter)]
        missing = list(dict.fromkeys(filter(_is_incomplete, missing)))
        for parameter in missing:
            parameter.all_gather()
            self._gathered.append(parameter)
        if missing:
            self._shard_oldest(keep=missing)
        return func(*args, **kwargs)

    def shard_all(self) -> None:
        """Shards all that were gathered."""
        self._shard(self._gathered)
        self._gathered = []

    def _shard_oldest(self, keep: Iterable[Any]) -> None:
        kept = set(map(id, keep))
        while sum(p.nbytes for p in self._gathered) > MOST_GATHERED:
            if id(self._gathered[0]) in kept:
                return
            self._shard([self._gathered.pop(0)])

    def _shard(self, parameters: Iterable[Any]) -> None:
        for parameter in parameters:
            if not _is_incomplete(parameter):
                make_contiguous([parameter])
                group = parameter.ds_process_group
                dist.broadcast(parameter.data, dist.get_global_rank(group, 0), group=group)
                parameter.partition(has_been_updated=True)


def _is_incomplete(parameter: Any) -> bool:
    return is_sharded(parameter) and parameter.ds_status.name == "NOT_AVAILABLE"
