"""Who keeps what of a low-rank optimizer's state: matrices that ZeRO cut, dealt out by channels.

A *channel* is a row or a column of a matrix along its longer side; its other side is *inner*. What
is kept of a channel lies on one rank: on the one that holds all of its elements, or, if a shard's
boundary goes through it, on the one that it is dealt to. `ChannelPlan` turns the segments of all
ranks into this rank's work: rectangles to project, and a table of rows, *slots*, one for every
channel:

    [ channels that lie here whole | channels that ranks share, dealt out in equal chunks ]

Pure arithmetic: no tensor data is touched and nothing is communicated.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod

import torch

from harness.zero.partition import Segment
from harness.zero.shards import Shard

STRIP = 2**18
"""Elements of a rectangle at most: what is computed from it stays in a CPU's cache."""


@dataclass(frozen=True)
class Matrix:
    """A parameter, or one slice of a stack of matrices, as rows x columns."""

    name: str
    """The parameter's name, with [n] behind it for slice n of a stack."""
    start: int
    """Its first element in the flattened parameter."""
    rows: int
    columns: int

    @property
    def by_rows(self) -> bool:
        """Whether its channels are rows: the longer side has the channels."""
        return self.rows >= self.columns

    @property
    def channels(self) -> int:
        """How many channels it has."""
        return max(self.rows, self.columns)

    @property
    def inner(self) -> int:
        """How many elements a channel has."""
        return min(self.rows, self.columns)


@dataclass(frozen=True)
class Run:
    """Channels [channel, channel + count) of a matrix, in as many slots one after the other."""

    matrix: int
    channel: int
    count: int


@dataclass(frozen=True)
class Block:
    """A rectangle of a matrix that lies in one stretch of a flat. A channel that is a row is in one
    block alone, one that is a column in many."""

    flat: int
    offset: int
    matrix: int
    channels: range
    inner: range
    slots: slice
    """The slots of its channels."""
    strides: tuple[int, int]
    """From channel to channel, and along one."""

    def of(self, flats: Sequence[torch.Tensor]) -> torch.Tensor:
        """This block of contiguous flats: a view (channels, inner)."""
        flat = flats[self.flat]
        shape = len(self.channels), len(self.inner)
        return flat.as_strided(shape, self.strides, flat.storage_offset() + self.offset)


def matrices_of(name: str, shape: Sequence[int], stacked: bool) -> list[Matrix]:
    """The matrices that a parameter is: (s0, s1 * s2 * ...), or with `stacked` one per index of s0.

    Raises ValueError for a shape that is no matrix.
    """
    sides = tuple(shape[1:]) if stacked else tuple(shape)
    if len(sides) < 2 or not prod(shape):
        raise ValueError(
            f"parameter {name!r} of shape {tuple(shape)} is no matrix{' per slice' * stacked}, and "
            "its group has rank > 0: put it into a group with rank = 0, as apollo_param_groups does"
        )
    rows, columns = sides[0], prod(sides[1:])
    if not stacked:
        return [Matrix(name, 0, rows, columns)]
    size = rows * columns
    return [Matrix(f"{name}[{n}]", n * size, rows, columns) for n in range(shape[0])]


class ChannelPlan:
    """This rank's part in stepping some flats of one parameter group.

    Either all flats hold whole parameters, or there is one, and it is sharded.
    """

    def __init__(self, shards: Sequence[Shard], matrices: Mapping[str, Sequence[Matrix]]):
        """`matrices`: those of every parameter, by the parameter's name."""
        self.rank = shards[0].rank
        self.world = len(shards[0].segments)
        self.matrices: list[Matrix] = []
        self.flat_of_matrix: list[int] = []
        self.local: list[Run] = []
        """The channels that lie on this rank whole."""
        self.shared: list[Run] = []
        """The channels that several ranks have elements of; the same list on all of them."""
        self.holders: list[list[int]] = []
        """The ranks that have elements of a matrix, for every one."""
        self.is_cut = False
        """Whether several ranks have elements of one matrix, if only of different channels."""
        held: list[
            tuple[int, int, int, Segment]
        ] = []  # matrix, start, stop, and the piece it is in
        for flat, shard in enumerate(shards):
            assert len(shards) == 1 or len(shard.segments) == 1
            for number, piece in enumerate(shard.own):
                for matrix in matrices[piece.name]:
                    spans = [_span(matrix, segments[number]) for segments in shard.segments]
                    held.append((len(self.matrices), *spans[self.rank], piece))
                    self._deal(matrix, spans)
                    self.matrices.append(matrix)
                    self.flat_of_matrix.append(flat)
        self.rows_here = sum(run.count for run in self.local)
        self.chunk = -(-sum(run.count for run in self.shared) // self.world)
        """Slots of shared channels that each rank is dealt; the last ones may be empty."""
        self.rows = self.rows_here + self.chunk
        """Rows of state on this rank."""
        self.slots = self.rows_here + self.chunk * self.world
        self.matrix_of_slot = self._matrix_of_slot()
        self.rows_of_flat = self._rows_of_flat(len(shards))
        self.blocks = [block for span in held for block in self._blocks(*span)]

    def owned(self) -> Iterator[tuple[int, Run]]:
        """The channels whose state is on this rank, by runs, each with its first row of state."""
        row = 0
        for run in self.local:
            yield row, run
            row += run.count
        first, slot = self.rank * self.chunk, 0
        for run in self.shared:
            begin, end = max(slot, first), min(slot + run.count, first + self.chunk)
            if begin < end:
                channel = run.channel + begin - slot
                yield row + begin - first, Run(run.matrix, channel, end - begin)
            slot += run.count

    @cached_property
    def matrices_of_flat(self) -> list[list[int]]:
        """The matrices of every flat."""
        found: list[list[int]] = [[] for _ in self.rows_of_flat]
        for number, flat in enumerate(self.flat_of_matrix):
            found[flat].append(number)
        return found

    @cached_property
    def projected(self) -> dict[int, tuple[int, int]]:
        """Where the whole P of a matrix that has elements here stands, if the P of a flat's are
        kept one below the other: first row and rows (`inner`)."""
        found: dict[int, tuple[int, int]] = {}
        for numbers in self.matrices_of_flat:
            here = [number for number in numbers if self.rank in self.holders[number]]
            sizes = [self.matrices[number].inner for number in here]
            for number, first, size in zip(here, accumulate(sizes, initial=0), sizes, strict=False):
                found[number] = first, size
        return found

    @cached_property
    def kept(self) -> list[list[tuple[int, Run]]]:
        """For every matrix, its channels that `owned` gives, each run with its first row in the
        state of the matrix's flat."""
        found: list[list[tuple[int, Run]]] = [[] for _ in self.matrices]
        firsts = [0, *accumulate(self.rows_of_flat)]
        for row, run in self.owned():
            found[run.matrix].append((row - firsts[self.flat_of_matrix[run.matrix]], run))
        return found

    def _deal(self, matrix: Matrix, spans: list[tuple[int, int]]) -> None:
        """Adds a matrix's channels to those that are here, or shared."""
        number = len(self.matrices)
        start, stop = spans[self.rank]
        holders = [rank for rank, (first, last) in enumerate(spans) if first < last]
        self.holders.append(holders)
        self.is_cut |= len(holders) > 1
        if len(holders) == 1:
            if start < stop:
                self.local.append(Run(number, 0, matrix.channels))
        elif matrix.by_rows:
            first, last = -(-start // matrix.columns), stop // matrix.columns
            if first < last:
                self.local.append(Run(number, first, last - first))
            cuts = {first // matrix.columns for first, _ in spans if first % matrix.columns}
            self.shared += [Run(number, row, 1) for row in sorted(cuts)]
        else:  # every shard but a tiny one has a part of every column
            self.shared.append(Run(number, 0, matrix.channels))

    def _blocks(self, number: int, start: int, stop: int, piece: Segment) -> Iterator[Block]:
        matrix, flat = self.matrices[number], self.flat_of_matrix[number]
        for row, column, height, width in _rectangles(start, stop, matrix.columns):
            channels, inner = range(row, row + height), range(column, column + width)
            strides = width, 1
            if not matrix.by_rows:
                channels, inner, strides = inner, channels, (1, width)
            offset = piece.offset + matrix.start + row * matrix.columns + column - piece.start
            first = self._slot(number, channels.start, len(channels))
            slots = slice(first, first + len(channels))
            yield Block(flat, offset, number, channels, inner, slots, strides)

    def _slot(self, matrix: int, channel: int, count: int) -> int:
        """The slot of a channel; the `count` channels from it on follow."""
        for first, runs in ((0, self.local), (self.rows_here, self.shared)):
            slot = first
            for run in runs:
                ahead = channel - run.channel
                if run.matrix == matrix and ahead >= 0 and ahead + count <= run.count:
                    return slot + ahead
                slot += run.count
        raise AssertionError(f"{self.matrices[matrix]} has no slot for channel {channel}")

    def _matrix_of_slot(self) -> torch.Tensor:
        """The matrix of each slot; of an empty one, the number of matrices: int64 (slots,)."""
        runs = [*self.local, *self.shared]
        counts = [run.count for run in runs]
        matrices = torch.tensor([*(run.matrix for run in runs), len(self.matrices)])
        empty = self.slots - sum(counts)
        return matrices.repeat_interleave(torch.tensor([*counts, empty]))

    def _rows_of_flat(self, flats: int) -> list[int]:
        rows = [0] * flats
        for run in self.local:
            rows[self.flat_of_matrix[run.matrix]] += run.count
        rows[-1] += self.chunk
        return rows


def _span(matrix: Matrix, piece: Segment) -> tuple[int, int]:
    """The elements of a matrix, counted from its first one, that are in a piece."""
    size = matrix.rows * matrix.columns
    start = min(max(piece.start - matrix.start, 0), size)
    return start, min(max(piece.start + piece.length - matrix.start, start), size)


def _rectangles(start: int, stop: int, columns: int) -> Iterator[tuple[int, int, int, int]]:
    """Elements [start, stop) of a matrix as (row, column, height, width): the end of a row, whole
    rows in strips, the beginning of a row."""
    while start < stop:
        row, column = divmod(start, columns)
        if column or stop - start < columns:
            height, width = 1, min(columns - column, stop - start)
        else:
            height, width = min((stop - start) // columns, max(1, STRIP // columns)), columns
        yield row, column, height, width
        start += height * width
