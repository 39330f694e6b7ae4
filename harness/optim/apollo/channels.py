"""Which rank keeps which part of a low-rank optimizer's state when ZeRO shards the matrices.

The longer side of a matrix indexes its *channels* (rows or columns); the shorter side is *inner*.
The state of a channel is on one rank: the one that has all of its elements or, if a shard boundary
cuts the channel, the one it is assigned to. `ChannelPlan` turns the segments of all ranks into this
rank's work: tiles to project, and a table of rows, *slots*, one per channel:

    [ channels that are complete on this rank | channels that ranks share, in equal chunks ]

Pure arithmetic: it reads no tensor data and communicates nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod

import torch

from harness.devices import LIMITS
from harness.zero.partition import Segment
from harness.zero.shards import Shard


@dataclass(frozen=True)
class Matrix:
    """A parameter, or one slice of a stack of matrices, as rows x columns."""

    name: str
    """The parameter's name, followed by [n] for slice n of a stack."""
    start: int
    """Its first element in the flattened parameter."""
    rows: int
    columns: int

    @property
    def by_rows(self) -> bool:
        """Whether its channels are rows: it has at least as many rows as columns."""
        return self.rows >= self.columns

    @property
    def channels(self) -> int:
        """The number of channels."""
        return max(self.rows, self.columns)

    @property
    def inner(self) -> int:
        """The elements of a channel."""
        return min(self.rows, self.columns)


@dataclass(frozen=True)
class ChannelRange:
    """Channels [channel, channel + count) of a matrix, in consecutive slots."""

    matrix: int
    channel: int
    count: int


@dataclass(frozen=True)
class Tile:
    """A rectangle of a matrix that is contiguous in a flat. On each rank, a row channel is in one
    tile, a column channel in many."""

    flat: int
    offset: int
    matrix: int
    channels: range
    inner: range
    slots: slice
    """The slots of its channels."""
    strides: tuple[int, int]
    """Between channels, and within a channel."""

    def of(self, flats: Sequence[torch.Tensor]) -> torch.Tensor:
        """This tile as a view (channels, inner) of contiguous flats."""
        flat = flats[self.flat]
        shape = len(self.channels), len(self.inner)
        return flat.as_strided(shape, self.strides, flat.storage_offset() + self.offset)


def matrices_of(
    name: str,
    shape: Sequence[int],
    stacked: bool,
    dense: str = "rank = 0, as apollo_param_groups does",
) -> list[Matrix]:
    """The matrices of a parameter: one, (s0, s1 * s2 * ...), or with `stacked` one per index of s0.

    Raises ValueError for a shape that is not a matrix; `dense` is what its group lacks.
    """
    sides = tuple(shape[1:]) if stacked else tuple(shape)
    if len(sides) < 2 or not prod(shape):
        raise ValueError(
            f"parameter {name!r} of shape {tuple(shape)} is not a matrix{' per slice' * stacked}: "
            f"move it to a group with {dense}"
        )
    rows, columns = sides[0], prod(sides[1:])
    if not stacked:
        return [Matrix(name, 0, rows, columns)]
    size = rows * columns
    return [Matrix(f"{name}[{n}]", n * size, rows, columns) for n in range(shape[0])]


class ChannelPlan:
    """This rank's share of stepping some flats of one parameter group.

    Either all flats hold complete parameters, or there is a single flat, which is sharded.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        matrices: Mapping[str, Sequence[Matrix]],
        tile_elements: int = LIMITS["cpu"].tile_elements,
    ):
        """`matrices`: the matrices of each parameter, by parameter name. `tile_elements`: the
        largest size of a tile of several rows."""
        self._tile_elements = tile_elements
        self.rank = shards[0].rank
        self.world = len(shards[0].segments)
        self.matrices: list[Matrix] = []
        self.flat_of_matrix: list[int] = []
        self.local: list[ChannelRange] = []
        """The channels that are complete on this rank."""
        self.shared: list[ChannelRange] = []
        """The channels that several ranks have elements of; the same list on all of them."""
        self.holders: list[list[int]] = []
        """For each matrix, the ranks that have elements of it."""
        self.is_cut = False
        """Whether several ranks have elements of one matrix, even of different channels."""
        self._spans: list[tuple[int, int, int, Segment]] = []
        """Of each matrix that this rank may have elements of: its number, start, stop, segment."""
        for flat, shard in enumerate(shards):
            assert len(shards) == 1 or len(shard.segments) == 1
            for number, segment in enumerate(shard.own):
                for matrix in matrices[segment.name]:
                    by_rank = [_span(matrix, segments[number]) for segments in shard.segments]
                    self._spans.append((len(self.matrices), *by_rank[self.rank], segment))
                    self._assign(matrix, by_rank)
                    self.matrices.append(matrix)
                    self.flat_of_matrix.append(flat)
        self.local_rows = sum(channels.count for channels in self.local)
        self.chunk = -(-sum(channels.count for channels in self.shared) // self.world)
        """Slots for shared channels on each rank; the last ones may be empty."""
        self.rows = self.local_rows + self.chunk
        """Rows of state on this rank."""
        self.slots = self.local_rows + self.chunk * self.world
        self.rows_of_flat = self._rows_of_flat(len(shards))

    def owned(self) -> Iterator[tuple[int, ChannelRange]]:
        """The channels whose state is on this rank: (first row of state, range)."""
        row = 0
        for channels in self.local:
            yield row, channels
            row += channels.count
        first, slot = self.rank * self.chunk, 0
        for channels in self.shared:
            begin, end = max(slot, first), min(slot + channels.count, first + self.chunk)
            if begin < end:
                channel = channels.channel + begin - slot
                yield row + begin - first, ChannelRange(channels.matrix, channel, end - begin)
            slot += channels.count

    @cached_property
    def tiles(self) -> list[Tile]:
        """What this rank has of the matrices, as rectangles."""
        return [tile for span in self._spans for tile in self._tiles(*span)]

    @cached_property
    def matrix_of_slot(self) -> torch.Tensor:
        """The matrix of each slot, or the number of matrices for an empty slot: int64 (slots,)."""
        ranges = [*self.local, *self.shared]
        counts = [channels.count for channels in ranges]
        matrices = torch.tensor([*(channels.matrix for channels in ranges), len(self.matrices)])
        empty = self.slots - sum(counts)
        return matrices.repeat_interleave(torch.tensor([*counts, empty]), output_size=self.slots)

    @cached_property
    def matrices_of_flat(self) -> list[list[int]]:
        """The matrix numbers of each flat."""
        by_flat: list[list[int]] = [[] for _ in self.rows_of_flat]
        for number, flat in enumerate(self.flat_of_matrix):
            by_flat[flat].append(number)
        return by_flat

    @cached_property
    def projection_rows(self) -> dict[int, tuple[int, int]]:
        """First row and number of rows (`inner`) of each complete P that this rank keeps, where one
        tensor per flat concatenates them; by matrix, for those that it has elements of."""
        rows_of_matrix: dict[int, tuple[int, int]] = {}
        for numbers in self.matrices_of_flat:
            held = [number for number in numbers if self.rank in self.holders[number]]
            sizes = [self.matrices[number].inner for number in held]
            for number, first, size in zip(held, accumulate(sizes, initial=0), sizes, strict=False):
                rows_of_matrix[number] = first, size
        return rows_of_matrix

    @cached_property
    def owned_of_matrix(self) -> list[list[tuple[int, ChannelRange]]]:
        """For each matrix, the ranges that `owned` yields, with rows counted within the state of
        the matrix's flat."""
        by_matrix: list[list[tuple[int, ChannelRange]]] = [[] for _ in self.matrices]
        firsts = [0, *accumulate(self.rows_of_flat)]
        for row, channels in self.owned():
            first = firsts[self.flat_of_matrix[channels.matrix]]
            by_matrix[channels.matrix].append((row - first, channels))
        return by_matrix

    def _assign(self, matrix: Matrix, spans: list[tuple[int, int]]) -> None:
        """Adds a matrix's channels to `local` or `shared`. `spans`: by rank."""
        number = len(self.matrices)
        start, stop = spans[self.rank]
        holders = [rank for rank, (first, last) in enumerate(spans) if first < last]
        self.holders.append(holders)
        self.is_cut |= len(holders) > 1
        if len(holders) == 1:
            if start < stop:
                self.local.append(ChannelRange(number, 0, matrix.channels))
        elif matrix.by_rows:
            first, last = -(-start // matrix.columns), stop // matrix.columns
            if first < last:
                self.local.append(ChannelRange(number, first, last - first))
            cuts = {first // matrix.columns for first, _ in spans if first % matrix.columns}
            self.shared += [ChannelRange(number, row, 1) for row in sorted(cuts)]
        else:  # all but tiny shards have elements of every column
            self.shared.append(ChannelRange(number, 0, matrix.channels))

    def _tiles(self, number: int, start: int, stop: int, segment: Segment) -> Iterator[Tile]:
        matrix, flat = self.matrices[number], self.flat_of_matrix[number]
        rectangles = _rectangles(start, stop, matrix.columns, self._tile_elements)
        for row, column, height, width in rectangles:
            channels, inner = range(row, row + height), range(column, column + width)
            strides = width, 1
            if not matrix.by_rows:
                channels, inner, strides = inner, channels, (1, width)
            offset = segment.offset + matrix.start + row * matrix.columns + column - segment.start
            first = self._slot(number, channels.start, len(channels))
            slots = slice(first, first + len(channels))
            yield Tile(flat, offset, number, channels, inner, slots, strides)

    def _slot(self, matrix: int, channel: int, count: int) -> int:
        """The slot of a channel; the next `count` - 1 channels follow it."""
        for first, ranges in ((0, self.local), (self.local_rows, self.shared)):
            slot = first
            for channels in ranges:
                ahead = channel - channels.channel
                if channels.matrix == matrix and ahead >= 0 and ahead + count <= channels.count:
                    return slot + ahead
                slot += channels.count
        raise AssertionError(f"{self.matrices[matrix]} has no slot for channel {channel}")

    def _rows_of_flat(self, flats: int) -> list[int]:
        rows = [0] * flats
        for channels in self.local:
            rows[self.flat_of_matrix[channels.matrix]] += channels.count
        rows[-1] += self.chunk
        return rows


def _span(matrix: Matrix, segment: Segment) -> tuple[int, int]:
    """The range of a matrix's elements, counted from its first one, that is in a segment."""
    size = matrix.rows * matrix.columns
    start = min(max(segment.start - matrix.start, 0), size)
    return start, min(max(segment.stop - matrix.start, start), size)


def _rectangles(
    start: int, stop: int, columns: int, most: int
) -> Iterator[tuple[int, int, int, int]]:
    """Elements [start, stop) of a matrix as (row, column, height, width): the end of a row,
    complete rows in strips of at most `most` elements, the beginning of a row."""
    while start < stop:
        row, column = divmod(start, columns)
        if column or stop - start < columns:
            height, width = 1, min(columns - column, stop - start)
        else:
            height = min((stop - start) // columns, max(1, most // columns))
            width = columns
        yield row, column, height, width
        start += height * width
