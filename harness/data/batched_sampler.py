"""Batches of items of similar length, as a sampler; usable without harness."""

import math
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from harness.data.sampler import Sampler, epoch_generator


class _Batches(Sequence[list[int]]):
    """Lists of indices, one after another in an array, in another order."""

    def __init__(self) -> None:
        self.order = array("q")
        self._indices = array("q")
        self._ends = array("q", [0])

    def append(self, batch: list[int]) -> None:
        self._indices.extend(batch)
        self._ends.append(len(self._indices))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self._batch(number) for number in self.order[place]]
        return self._batch(self.order[place])

    def _batch(self, number: int) -> list[int]:
        return self._indices[self._ends[number] : self._ends[number + 1]].tolist()


class BatchedOrderedSampler(Sampler[list[int]]):
    """Batches of items of similar length, each within limits; a draw is one batch's indices.

    The items are sorted by length, ties by index, and split into `buckets` buckets of equal count.
    A batch takes the next items of a bucket while they exceed neither limit; at least one limit is
    required. `max_batch_size` counts items. `max_tokens`, in the unit of `lengths`, bounds the
    longest item times the batch's size if `padded`, else the sum of the lengths.

    `shuffle` reshuffles the items within their buckets, and all batches, every epoch: more buckets
    then mean less padding, and the number of batches may differ between epochs. `drop_last` drops
    the last batch of a bucket if the bucket's shortest item would still fit into it.

    It takes 16 bytes per item, and an epoch's order 16 more at most.

    Raises ValueError for arguments out of range, for a single item that exceeds `max_tokens`, and
    if `drop_last` drops all batches.
    """

    def __init__(
        self,
        lengths: Sequence[float],
        *,
        max_tokens: float | None = None,
        max_batch_size: int | None = None,
        padded: bool = True,
        buckets: int = 1,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(len(lengths), seed=seed, rank=rank, world_size=world_size)
        if max_tokens is None and max_batch_size is None:
            raise ValueError("set max_tokens, max_batch_size, or both")
        if max_batch_size is not None and max_batch_size <= 0:
            raise ValueError(f"max_batch_size = {max_batch_size}: expected an integer >= 1")
        if buckets <= 0:
            raise ValueError(f"buckets = {buckets}: expected an integer >= 1")
        self.max_tokens = math.inf if max_tokens is None else max_tokens
        self.max_batch_size = math.inf if max_batch_size is None else max_batch_size
        self.padded = padded
        self.buckets = buckets
        self.shuffle = shuffle
        self.drop_last = drop_last
        sizes = torch.as_tensor(lengths, dtype=torch.float64)
        self._lengths = array("d", sizes.numpy().tobytes())
        for index, size in enumerate(self._lengths):
            if not 0 <= size < math.inf:
                raise ValueError(f"lengths[{index}] = {size:g}: expected a finite number >= 0")
            if size > self.max_tokens:
                raise ValueError(f"lengths[{index}] = {size:g} exceeds max_tokens = {max_tokens}")
        self._lengths_crc32 = zlib.crc32(sizes.numpy().tobytes())
        self._buckets = sizes.sort(stable=True).indices.tensor_split(min(buckets, self.length))
        if drop_last and not self.draws(0):
            raise ValueError(f"drop_last drops all batches of the {self.length} items")

    def draws(self, epoch: int) -> int:
        return len(self._cached_order(epoch))

    def order(self, epoch: int) -> Sequence[list[int]]:
        generator = epoch_generator(self.seed, epoch)

        def shuffled(indices: torch.Tensor) -> torch.Tensor:
            if not self.shuffle:
                return indices
            return indices[torch.randperm(len(indices), generator=generator)]

        batches = _Batches()
        for bucket in self._buckets:
            for batch in self._pack(shuffled(bucket).tolist()):
                batches.append(batch)
        batches.order = array("q", shuffled(torch.arange(len(batches))).numpy().tobytes())
        return batches

    def _pack(self, bucket: list[int]) -> Iterator[list[int]]:
        batch: list[int] = []
        longest = total = 0.0

        def fits(length: float) -> bool:
            size = len(batch) + 1
            tokens = size * max(longest, length) if self.padded else total + length
            return size <= self.max_batch_size and tokens <= self.max_tokens

        for index in bucket:
            length = self._lengths[index]
            if not fits(length):
                yield batch
                batch, longest, total = [], 0.0, 0.0
            batch.append(index)
            longest, total = max(longest, length), total + length
        if not (self.drop_last and fits(min(self._lengths[index] for index in bucket))):
            yield batch

    def _continues(self, state: Mapping[str, Any]) -> bool:
        return False  # the batches of an epoch depend on the lengths of all its items

    def _identity(self) -> dict[str, Any]:
        names = ("max_tokens", "max_batch_size", "padded", "buckets", "shuffle", "drop_last")
        options = {name: getattr(self, name) for name in names}
        return super()._identity() | options | {"lengths_crc32": self._lengths_crc32}
