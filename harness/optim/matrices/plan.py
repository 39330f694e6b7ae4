"""Which rank computes which matrix when ZeRO shards them: its *owner*.

A matrix that is complete on a rank is computed there. One that several ranks hold *pieces* of is
computed by one of them, such that all ranks have about equal work; the others send it their pieces.
Pure arithmetic, alike on all ranks: it reads no tensor data and communicates nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from harness.optim.apollo.channels import Matrix
from harness.zero.partition import Segment
from harness.zero.shards import Shard

Cost = Callable[[Matrix], float]
"""The work that a matrix is in a step, in any unit."""


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + length) of a matrix: from `offset` on in its holder's flat."""

    matrix: int
    holder: int
    owner: int
    start: int
    length: int
    offset: int


class OwnerPlan:
    """The owners of the matrices of one flat, and the pieces that the ranks have of them."""

    def __init__(
        self,
        shard: Shard,
        matrices: Mapping[str, Sequence[Matrix]],
        cost: Cost,
        load: list[float],
        owners: Sequence[int] | None = None,
    ):
        """`matrices`: the matrices of each parameter, by parameter name. `load`: the work that each
        rank already has, to which that of this flat is added; if `owners` are given, it is not
        needed."""
        self.rank = shard.rank
        self.matrices: list[Matrix] = []
        spans: list[list[tuple[int, int, int, int]]] = []  # by matrix: holder, start, stop, offset
        for number, segment in enumerate(shard.own):
            for matrix in matrices[segment.name]:
                by_rank = (
                    (rank, *_span(matrix, segments[number]))
                    for rank, segments in enumerate(shard.segments)
                )
                spans.append([span for span in by_rank if span[1] < span[2]])
                self.matrices.append(matrix)
        holders = [[holder for holder, *_ in pieces] for pieces in spans]
        if owners is None:
            owners = balanced_owners(holders, [cost(matrix) for matrix in self.matrices], load)
        self.owners = list(owners)
        self.is_cut = any(len(ranks) > 1 for ranks in holders)
        """Whether several ranks hold pieces of one matrix."""
        self.pieces = [
            Piece(matrix, holder, self.owners[matrix], start, stop - start, offset)
            for matrix, pieces in enumerate(spans)
            for holder, start, stop, offset in pieces
        ]
        """Of all ranks, by matrix, and then by holder."""
        self.held = [piece for piece in self.pieces if piece.holder == self.rank]
        """Those that this rank holds, by their offset."""
        self.owned = [piece for piece in self.pieces if piece.owner == self.rank]
        """Those of the matrices that this rank computes."""

    def split(self, flat: Tensor) -> list[Tensor]:
        """Views of the pieces that this rank holds, of a flat or of a tensor of its size: 1-D."""
        sizes, end = [], 0
        for piece in self.held:
            sizes += [piece.offset - end, piece.length]
            end = piece.offset + piece.length
        return list(flat.view(-1).split([*sizes, flat.numel() - end])[1::2])


def balanced_owners(
    holders: Sequence[Sequence[int]], costs: Sequence[float], load: list[float]
) -> list[int]:
    """The owner of each matrix, one of its holders; adds the costs to the ranks' `load`.

    Those with one holder first; the others from the most costly to the cheapest, each to the holder
    with the least load so far (Graham, 1969: at most one matrix above the mean).
    """
    owners = [0] * len(holders)
    by_cost = sorted(range(len(holders)), key=lambda matrix: (-costs[matrix], matrix))
    for matrix in sorted(by_cost, key=lambda matrix: len(holders[matrix]) > 1):
        owner = min(holders[matrix], key=lambda rank: (load[rank], rank))
        owners[matrix] = owner
        load[owner] += costs[matrix]
    return owners


def _span(matrix: Matrix, segment: Segment) -> tuple[int, int, int]:
    """The range of a matrix's elements, counted from its first one, that is in a segment, and its
    offset in the flat."""
    size = matrix.rows * matrix.columns
    start = min(max(segment.start - matrix.start, 0), size)
    stop = min(max(segment.stop - matrix.start, start), size)
    return start, stop, segment.offset + matrix.start + start - segment.start
