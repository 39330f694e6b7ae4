"""Held-out data: named sets, each read once by all ranks together, in batches."""

import re
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from harness.config.sections import DataConfig
from harness.data.fetch import Collate, Counted, CountingCollate, Fetch, unchanged
from harness.data.workers import iterated, loader_options
from harness.errors import TaskError


def sets_of(data: Any) -> dict[str, Any]:
    """The sets of `Task.eval_data` by name; a single one has the name "". None: no set."""
    if data is None:
        return {}
    is_named = isinstance(data, Mapping) and all(isinstance(name, str) for name in data)
    return dict(data) if is_named else {"": data}


def check_held_out(data: Any) -> dict[str, int | None]:
    """Checks `Task.eval_data`: the length of each set, by its name in messages; None: unknown.

    Raises TaskError if one cannot be read, or is empty.
    """
    lengths: dict[str, int | None] = {}
    sets = sets_of(data)
    if data is not None and not sets:
        raise TaskError("eval_data has no sets")
    for name, held_out in sets.items():
        if name and not re.fullmatch(r"\w[\w.-]*", name):
            raise TaskError(
                f"eval_data: the name {name!r} of a set: expected letters, digits, '_', '.' or '-'"
            )
        where = f"eval_data[{name!r}]" if name else "eval_data"
        lengths[where] = _checked_length(held_out, where)
    return lengths


def _checked_length(data: Any, where: str) -> int | None:
    kind = type(data).__name__
    if not (_is_map_style(data) or hasattr(data, "__iter__")) or isinstance(data, str | bytes):
        raise TaskError(
            f"{where} is a {kind}, expected a map-style dataset (`__len__` and `__getitem__`), an "
            "IterableDataset of this rank's samples, or an iterable of this rank's batches"
        )
    if isinstance(data, Iterator):
        raise TaskError(
            f"{where} is a {kind}, which can be read only once: use an object whose `__iter__` "
            "begins again"
        )
    if not _is_map_style(data):
        return None
    if len(data) == 0:
        raise TaskError(f"{where}: {kind} has no items")
    return len(data)


def _is_map_style(data: Any) -> bool:
    is_stream = isinstance(data, IterableDataset)  # some have `__getitem__` as well
    return hasattr(data, "__getitem__") and hasattr(data, "__len__") and not is_stream


def read_once(
    data: Any,
    config: DataConfig,
    collate: Collate,
    count: Callable[[Any], tuple[int, int]],
    seed: int,
    rank: int,
    world_size: int,
) -> Generator[Counted, None, None]:
    """One rank's batches of a set; other ranks may have more or fewer. Close it to end workers.

    A map-style dataset is split over the ranks, each sample once. An IterableDataset has the
    samples of this rank, and any other iterable its batches, of which `count` counts the samples.
    """
    size, generator = config.micro_batch_size, torch.Generator().manual_seed(seed)
    options = loader_options(config.workers, config.start_method, generator)
    if _is_map_style(data):
        starts = range(rank * size, len(data), size * world_size)
        shares = [range(start, min(start + size, len(data))) for start in starts]
        loader = DataLoader(
            Fetch(data, collate, seed),
            sampler=list(enumerate(shares)),
            batch_size=None,
            collate_fn=unchanged,
            **options,
        )
        with iterated(loader) as batches:
            for share, batch in zip(shares, batches, strict=True):
                yield len(share), batch
    elif isinstance(data, IterableDataset):
        counting = CountingCollate(collate)
        with iterated(DataLoader(data, batch_size=size, collate_fn=counting, **options)) as batches:
            yield from batches
    else:
        for batch in data:
            yield count(batch)[0], batch
