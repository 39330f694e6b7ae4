"""Streams and loaders of other libraries, where they are installed, resumed to the sample."""

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.config.sections import DataConfig
from harness.data.batches import Batches
from harness.data.train_batches import train_batches

LENGTH = 24


def resumed_equals_uninterrupted(
    make: Callable[[], Any],
    collate: Callable[[list[Any]], Any] = list,
    returns: bool = True,
    **keys: Any,
) -> list[list[Any]]:
    """What an uninterrupted run returns in three passes; checks that it is resumed after 1, 7, 12
    and 17 micro-batches of 2, of which 12 are a pass, and that it `returns` to the last of these
    places, as after a rollback."""

    def batches_of() -> Batches:
        config = DataConfig.model_validate({"micro_batch_size": 2} | keys)
        return train_batches(make(), config, collate, 0, 0, 1)

    whole = batches_of()
    found = as_lists(next(whole) for _ in range(36))
    whole.close()
    for stop in (1, 7, 12, 17):
        first, second = batches_of(), batches_of()
        for _ in range(stop):
            next(first)
        state = first.state_dict()
        first.close()
        second.load_state_dict(state | {"world_size": 1})
        torch.manual_seed(stop)
        assert as_lists(next(second) for _ in range(9)) == found[stop : stop + 9], stop
        second.close()
    if returns:
        moving = batches_of()
        for _ in range(stop):
            next(moving)
        state = moving.state_dict() | {"world_size": 1}
        for more in (3, 9):
            as_lists(next(moving) for _ in range(more))
            moving.load_state_dict(state)
        assert as_lists(next(moving) for _ in range(9)) == found[stop : stop + 9]
        moving.close()
    return found


def as_lists(batches: Iterable[Any]) -> list[list[Any]]:
    return [b.tolist() if isinstance(b, torch.Tensor) else b for b in batches]


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


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("kind", ["loader", "stream"])
def test_mosaicml_streaming(tmp_path: Path, kind: str, workers: int, shuffle: bool) -> None:
    streaming = pytest.importorskip("streaming")
    copies = itertools.count()

    def make() -> Any:
        local = tmp_path / f"{next(copies)}"  # which it wants to itself
        with streaming.MDSWriter(out=str(local), columns={"id": "int"}, size_limit=256) as writer:
            for number in range(LENGTH):
                writer.write({"id": number})
        keys: Any = {"shuffle": shuffle, "batch_size": 2, "num_canonical_nodes": 1}
        data = streaming.StreamingDataset(local=str(local), **keys)
        if kind == "stream":
            return data
        return streaming.StreamingDataLoader(data, 2, num_workers=workers, collate_fn=ids)

    keys: Any = {} if kind == "loader" else {"workers": workers}
    assert each_once_a_pass(resumed_equals_uninterrupted(make, ids, **keys))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("kind", ["loader", "stream"])
def test_litdata(tmp_path: Path, kind: str, workers: int, shuffle: bool) -> None:
    litdata = pytest.importorskip("litdata")
    keys: Any = {"num_workers": 1, "chunk_size": 6, "start_method": "fork"}
    litdata.optimize(
        fn=as_row, inputs=list(range(LENGTH)), output_dir=str(tmp_path / "data"), **keys
    )

    def make() -> Any:
        data = litdata.StreamingDataset(str(tmp_path / "data"), shuffle=shuffle)
        if kind == "stream":
            return data
        keys: Any = {"num_workers": workers, "collate_fn": ids}
        return litdata.StreamingDataLoader(data, batch_size=2, **keys)

    keys: Any = {} if kind == "loader" else {"workers": workers}
    # An iterator of litdata 0.2.76 that is left in the middle, in the rank's own process, sometimes
    # closes the file that the next one has opened.
    found = resumed_equals_uninterrupted(make, ids, returns=workers > 0, **keys)
    assert each_once_a_pass(found)


def ids(rows: list[Any]) -> torch.Tensor:
    return torch.tensor([row["id"] for row in rows])


def as_row(number: int) -> dict[str, int]:
    """Pickled by litdata's writers."""
    return {"id": number}
