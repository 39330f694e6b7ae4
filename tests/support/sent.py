"""What a rank sends to others in collectives, counted where torch dispatches them."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = {
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
    "alltoall_base_": "all-to-all",
}


class Sent(TorchDispatchMode):
    """Bytes by collective, as rings send them, while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            name = str(func.overloadpacket.__name__)
            self.bytes[KINDS.get(name, name)] += sent_bytes(name, args)
        return func(*args, **(kwargs or {}))


def sent_bytes(name: str, args: tuple[Any, ...]) -> int:
    """By this rank, in one call of an operator of c10d."""
    world, rank = dist.get_world_size(), dist.get_rank()
    if name == "alltoall_base_":
        splits = args[4]
        return (sum(splits) - splits[rank]) * args[1].element_size()
    sizes = [tensor.nbytes for tensor in tensors_in(args)]
    if name == "allreduce_":
        return 2 * sum(sizes) * (world - 1) // world
    return max(sizes, default=0) * (world - 1) // world


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """The tensors of nested arguments."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)
