"""The collectives of a step: one all-to-all takes pieces of matrices to their owners, one returns
what these have computed."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from harness.optim.matrices.plan import OwnerPlan
from harness.waiting import in_collective
from harness.zero.shards import Shard


class Exchange:
    """The collectives of a step that covers some flats; none where they are not sharded.

    A rank *holds* pieces of the flats' matrices and *owns* matrices, all in the order of the plans.
    """

    def __init__(
        self, plans: Sequence[OwnerPlan], shard: Shard, device: torch.device, dtype: torch.dtype
    ):
        """`device`, `dtype`: those of the computation."""
        self.is_cut = any(plan.is_cut for plan in plans)
        self._shard, self._device, self._dtype = shard, device, dtype
        self._world = len(shard.segments)
        held = [piece for plan in plans for piece in plan.held]
        owned = [piece for plan in plans for piece in plan.owned]
        self._to_owners = _Route(
            [(piece.owner, piece.length) for piece in held],
            [(piece.holder, piece.length) for piece in owned],
            shard.rank,
            self._world,
        )
        self._to_holders = _Route(
            [(piece.holder, piece.length) for piece in owned],
            [(piece.owner, piece.length) for piece in held],
            shard.rank,
            self._world,
        )

    def to_owners(self, held: Sequence[Tensor], is_finite: Tensor) -> tuple[list[Tensor], Tensor]:
        """Sends the pieces that this rank holds to their owners. Returns the pieces of its own
        matrices, and whether `is_finite` is true on all ranks: bool ()."""
        if self._world == 1:
            return list(held), is_finite
        failed = (~is_finite).to(self._device, self._dtype).view(1)
        pieces, flags = self._swap(self._to_owners, held, [failed])
        return pieces, torch.stack(flags).sum() == 0

    def to_holders(self, owned: Sequence[Tensor]) -> list[Tensor]:
        """Sends the pieces of this rank's own matrices to their holders. Returns those that it
        holds itself."""
        return self._swap(self._to_holders, owned, [])[0] if self.is_cut else list(owned)

    def _swap(
        self, route: "_Route", values: Sequence[Tensor], header: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Pieces, and in front of those for each rank a header of one element or none."""
        extra = len(header)
        parts: list[Tensor] = []
        for numbers in route.sent:
            parts += [*header, *(values[number] for number in numbers)]
        outgoing = torch.empty(0, dtype=self._dtype, device=self._device)
        if parts:
            outgoing = torch.cat([part.to(self._dtype) for part in parts]).to(self._device)
        incoming = outgoing.new_empty(sum(route.in_sizes) + extra * self._world)
        in_sizes = [size + extra for size in route.in_sizes]
        out_sizes = [size + extra for size in route.out_sizes]
        with in_collective:
            group = self._shard.group
            dist.all_to_all_single(incoming, outgoing, in_sizes, out_sizes, group=group)
        lengths = [n for of_rank in route.in_lengths for n in (*[1] * extra, *of_rank)]
        chunks = iter(incoming.split(lengths))
        headers: list[Tensor] = []
        arrived: list[Tensor] = []
        for of_rank in route.in_lengths:
            headers += [next(chunks) for _ in header]
            arrived += [next(chunks) for _ in of_rank]
        return [arrived[k] if k >= 0 else values[~k] for k in route.wanted], headers


class _Route:
    """Which pieces go from and to which ranks in one direction."""

    def __init__(
        self,
        values: Sequence[tuple[int, int]],
        results: Sequence[tuple[int, int]],
        rank: int,
        world: int,
    ):
        """`values`, `results`: where each piece goes to or comes from, and its length."""
        self.sent: list[list[int]] = [[] for _ in range(world)]
        """The values for each other rank."""
        kept: list[int] = []
        for number, (peer, _) in enumerate(values):
            (kept if peer == rank else self.sent[peer]).append(number)
        by_peer: list[list[int]] = [[] for _ in range(world)]
        for number, (peer, _) in enumerate(results):
            by_peer[peer].append(number)
        own, by_peer[rank] = by_peer[rank], []
        self.in_lengths = [[results[k][1] for k in numbers] for numbers in by_peer]
        self.in_sizes = [sum(lengths) for lengths in self.in_lengths]
        self.out_sizes = [sum(values[k][1] for k in numbers) for numbers in self.sent]
        self.wanted = [0] * len(results)
        """For each result the number of the arrived piece or, complemented, of the own value."""
        for arrival, number in enumerate(k for numbers in by_peer for k in numbers):
            self.wanted[number] = arrival
        for value, number in zip(kept, own, strict=True):
            self.wanted[number] = ~value
