"""What ZeRO has done to a parameter, by the attributes that DeepSpeed sets on it.

At stage 3 (partition_parameters.py) a parameter is an empty tensor between its uses, with its full
shape and this rank's shard as attributes. Nothing of harness or DeepSpeed is imported.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a parameter that ZeRO stage 3 has sharded."""
    return hasattr(tensor, "ds_id")


def is_of_earlier_run(tensor: Tensor) -> bool:
    """Whether it was sharded by a run in this process that has ended: its ranks' group is gone."""
    groups = torch.distributed.distributed_c10d._world.pg_map
    return is_sharded(tensor) and getattr(tensor, "ds_process_group", None) not in groups


def full_shape(tensor: Tensor) -> torch.Size:
    """The full shape, also of a sharded parameter."""
    return getattr(tensor, "ds_shape", tensor.shape)


def full_numel(tensor: Tensor) -> int:
    """The number of elements in total, also of a sharded parameter."""
    return getattr(tensor, "ds_numel", tensor.numel())


def shard(tensor: Tensor) -> Tensor | None:
    """This rank's shard of a sharded parameter, padded; None for any other tensor."""
    own: Any = getattr(tensor, "ds_tensor", None)
    return None if own is None else own.data


def is_expert(parameter: Tensor) -> bool:
    """Whether this is a weight of one of DeepSpeed's experts, which not every rank has."""
    return not getattr(parameter, "allreduce", True)


def make_contiguous(parameters: Iterable[Tensor]) -> None:
    """Orders the elements of parameters in memory, in place: DeepSpeed sends their bytes as they
    lie, and refuses others, as of model.to(memory_format=torch.channels_last)."""
    for parameter in parameters:
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
