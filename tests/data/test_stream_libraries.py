"""Streams and loaders of other libraries, where they are installed, resumed to the sample."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.config.sections import DataConfig
from harness.data.batches import Batches
from harness.data.train_batches import train_batches

LENGTH = 24


def resumed_equals_uninterrupted(
    make: Callable[[], Any], collate: Callable[[list[Any]], Any] = list, **keys: Any
) -> list[list[Any]]:
    """What an uninterrupted run returns in three passes; checks that it is resumed after 1, 7, 12
    and 17 micro-batches of 2, of which 12 are a pass."""

    def batches_of() -> Batches:
        config = DataConfig.model_validate({"micro_batch_size": 2} | keys)
        return train_batches(make(), config, collate, 0, 0, 1)

    whole = batches_of()
    found = [next(whole) for _ in range(36)]
    whole.close()
    for stop in (1, 7, 12, 17):
        first, second = batches_of(), batches_of()
        for _ in range(stop):
            next(first)
        state = first.state_dict()
        first.close()
        second.load_state_dict(state | {"world_size": 1})
        torch.manual_seed(stop)
        assert [next(second) for _ in range(9)] == found[stop : stop + 9], stop
        second.close()
    return found


def each_once_a_pass(found: list[list[Any]]) -> bool:
    passes = [[s for batch in found[at : at + 12] for s in batch] for at in (0, 12, 24)]
    return all(sorted(samples) == list(range(LENGTH)) for samples in passes)


@pytest.mark.parametrize("split", ["self", "stride"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_of_hugging_face(split: str, workers: int) -> None:
    datasets = pytest.importorskip("datasets")

    def make() -> Any:
        shards = datasets.Dataset.from_dict({"number": list(range(LENGTH))})
        return shards.to_iterable_dataset(num_shards=4).map(lambda row: {"number": row["number"]})

    def numbers(rows: list[Any]) -> list[int]:
        return [int(row["number"]) for row in rows]

    keys = {"split": split, "workers": workers}
    assert each_once_a_pass(resumed_equals_uninterrupted(make, numbers, **keys))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_of_torchdata(workers: int) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def make() -> Any:
        torch.manual_seed(0)  # as a task is built; the loader's sampler draws a seed
        keys: Any = {"shuffle": True, "collate_fn": list, "num_workers": workers}
        return stateful.StatefulDataLoader(range(LENGTH), 2, **keys)

    found = resumed_equals_uninterrupted(make)
    assert each_once_a_pass(found)
    assert found[:12] != found[12:24]


@pytest.mark.parametrize("split", ["self", "stride"])
@pytest.mark.parametrize("workers", [0, 2])
def test_shards_of_webdataset(tmp_path: Path, split: str, workers: int) -> None:
    wds = pytest.importorskip("webdataset")
    for shard in range(2):
        with wds.TarWriter(str(tmp_path / f"{shard}.tar")) as tar:
            for number in range(shard * LENGTH // 2, (shard + 1) * LENGTH // 2):
                tar.write({"__key__": str(number), "number.txt": str(number)})
    urls = [str(tmp_path / f"{shard}.tar") for shard in range(2)]

    def make() -> Any:
        return wds.WebDataset(urls, shardshuffle=False).decode().to_tuple("number.txt")

    def numbers(samples: list[Any]) -> list[int]:
        return [int(text) for (text,) in samples]

    found = resumed_equals_uninterrupted(make, numbers, split=split, workers=workers)
    assert each_once_a_pass(found)
