"""What a task's `train_data` is, and the micro-batches that a rank gets of it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from harness.config.sections import DataConfig
from harness.data.batched_sampler import BatchedOrderedSampler
from harness.data.batches import Batches
from harness.data.fetch import Collate
from harness.data.loader import Loader
from harness.data.mixture import Mixture, MixtureSampler
from harness.data.sampler import (
    OrderedSampler,
    PoolSampler,
    RandomSampler,
    Sampler,
)
from harness.data.skipping import Skips
from harness.data.stream import has_state, is_stream, length_of
from harness.data.stream_loader import StreamLoader
from harness.data.strided_stream import StridedStream
from harness.data.task_loader import TaskLoader
from harness.errors import ConfigError, TaskError
from harness.utils import check_state


def train_batches(
    data: Any, config: DataConfig, collate: Collate, seed: int, rank: int, world_size: int
) -> Batches:
    """The training micro-batches of one rank. Raises TaskError if `data` is not usable.

    A torch IterableDataset, also one with `__getitem__`, is a stream of samples.
    """
    if isinstance(data, Mapping):
        data = _mixture(data)
    if config.mix and not isinstance(data, Mixture):
        raise ConfigError(
            f"data.mix: train_data is a {type(data).__name__}, expected a dict of datasets"
        )
    if length_of(data) == 0:
        raise TaskError(f"train_data: {type(data).__name__} has no items")
    size, workers, start_method = config.micro_batch_size, config.workers, config.start_method
    own_seed = seed * world_size + rank
    is_map_style = hasattr(data, "__getitem__") and not is_stream(data)
    if config.on_error == "skip" and not is_map_style:
        raise ConfigError(
            f"data.on_error = 'skip': train_data is a {type(data).__name__}, expected a map-style "
            "dataset or a dict of them: a stream ends at its first error, and must skip by itself "
            "what it cannot read"
        )
    if is_stream(data):
        _check_state(data)
        if config.split == "stride":
            ranks = seed, rank, world_size
            return StridedStream(data, size, collate, workers, start_method, *ranks)
        loader = StreamLoader(data, size, collate, workers, start_method, own_seed)
        return TaskLoader(loader, world_size, own_seed)
    if config.split == "stride":
        raise ConfigError(
            f"data.split = 'stride': train_data is a {type(data).__name__}, expected a stream: an "
            "IterableDataset, or a function that returns an iterator of samples"
        )
    if not is_map_style:
        _check_loader(data)
        return TaskLoader(data, world_size, own_seed)
    if length_of(data) is None:
        raise TaskError(f"train_data: {type(data).__name__} has no length (`__len__`)")
    sampler = _sampler(data, config, seed, rank, world_size)
    skips = Skips(config.most_skipped) if config.on_error == "skip" else None
    return Loader(data, sampler, size, collate, workers, own_seed, start_method, skips)


def _check_loader(data: Any) -> None:
    """Raises TaskError if `data` is not a loader that can be iterated again and again."""
    kind = type(data).__name__
    if isinstance(data, Iterator):
        raise TaskError(
            f"train_data is a {kind}, which can be read only once: use the function that returns "
            "it, or an object whose `__iter__` begins again"
        )
    if not hasattr(data, "__iter__"):
        raise TaskError(
            f"train_data is a {kind}, expected a map-style dataset (`__len__` and `__getitem__`), "
            "a dict of them, an IterableDataset, a function that returns an iterator of samples, "
            "or a loader of batches (`__iter__`)"
        )
    _check_state(data)


def mixture_weights(config: DataConfig) -> dict[str, float]:
    """The configured weights of a mixture's sources, by name."""
    return {name: source.weight for name, source in config.mix.items()}


def _mixture(sources: Mapping[str, Any]) -> Mixture:
    """Raises TaskError if a source is not a map-style dataset with items."""
    for name, source in sources.items():
        if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
            raise TaskError(
                f"train_data[{name!r}]: {type(source).__name__}, expected a map-style dataset"
            )
    try:
        return Mixture(sources)
    except ValueError as error:
        raise TaskError(f"train_data: {error}") from None


def train_lengths(data: Any) -> dict[str, int | None]:
    """The lengths of the training data, by what they are called in messages; None: unknown."""
    if isinstance(data, Mapping):
        return {f"train_data[{name!r}]": len(source) for name, source in data.items()}
    return {"train_data": length_of(data)}


def may_be_uneven(batches: Batches, lengths: Sequence[int | None]) -> bool:
    """Whether some ranks may have more batches in an epoch than others; `lengths`: of each."""
    if not isinstance(batches, TaskLoader) or len(lengths) == 1:
        return False
    return None in lengths or len(set(lengths)) > 1


def _check_state(loader: Any) -> None:
    """Raises TaskError if a state could be saved, but not loaded."""
    if has_state(loader):
        check_state(loader.state_dict(), f"train_data: the state_dict of {type(loader).__name__}")


def _sampler(data: Any, config: DataConfig, seed: int, rank: int, world_size: int) -> Sampler:
    ranks: dict[str, Any] = {"seed": seed, "rank": rank, "world_size": world_size}
    if isinstance(data, Mixture):
        if config.sampler != "random":
            raise ConfigError(f"data.sampler = {config.sampler!r}: a mixture needs 'random'")
        weights = mixture_weights(config) or data.lengths
        try:
            return MixtureSampler(data.lengths, weights, **ranks)
        except ValueError as error:
            raise ConfigError(f"data.mix: {error}") from None
    match config.sampler:
        case "random":
            return RandomSampler(len(data), **ranks)
        case "ordered":
            return OrderedSampler(len(data), **ranks)
        case "pool":
            return PoolSampler(len(data), **ranks)
        case "batched":
            lengths: Sequence[int] | None = getattr(data, "lengths", None)
            if lengths is None:
                raise ConfigError(
                    f"data.sampler = 'batched' needs train_data.lengths (the length of every "
                    f"sample), which {type(data).__name__} does not have"
                )
            try:
                return BatchedOrderedSampler(
                    lengths,
                    max_tokens=config.max_tokens or None,
                    max_batch_size=config.micro_batch_size,
                    buckets=config.buckets,
                    shuffle=True,
                    **ranks,
                )
            except ValueError as error:
                raise ConfigError(f"data.sampler = 'batched': {error}") from None
