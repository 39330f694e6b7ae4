"""The collectives of a step: one reduce-scatter and one all-gather for all tensor groups."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from harness.optim.sharded.tensor_groups import TensorGroup, common_shard
from harness.waiting import in_collective


class Exchange:
    """The collectives of one step; none where the parameters are not sharded."""

    def __init__(self, tensor_groups: Sequence[TensorGroup]):
        """Raises ShardError if they are sharded over different process groups."""
        self._shard = common_shard(tensor_groups)
        self._world = tensor_groups[0].world

    def reduce_scatter(self, sent: Sequence[Tensor]) -> list[Tensor]:
        """For each tensor (W, any), this rank's row, summed over the ranks: (any,)."""
        outgoing = torch.cat(list(sent), dim=1)
        incoming = outgoing[0]
        if self._world > 1:
            outgoing = outgoing.to(self._shard.device)
            incoming = torch.empty_like(outgoing[0])
            with in_collective:
                dist.reduce_scatter_tensor(incoming, outgoing.flatten(), group=self._shard.group)
            incoming = incoming.to(sent[0].device)
        return list(incoming.split([tensor.shape[1] for tensor in sent]))

    def all_gather(self, sent: Sequence[Tensor]) -> list[Tensor]:
        """For each tensor (any,), the tensors of all ranks: (W, any)."""
        outgoing = torch.cat(list(sent)).to(self._shard.device)
        incoming = outgoing.new_empty(self._world, len(outgoing))
        with in_collective:
            dist.all_gather_into_tensor(incoming.view(-1), outgoing, group=self._shard.group)
        return list(incoming.to(sent[0].device).split([len(tensor) for tensor in sent], dim=1))
