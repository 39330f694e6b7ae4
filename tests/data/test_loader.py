"""Loaders of the task's own, and samples that each rank reads for itself."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset, default_collate, get_worker_info

from harness.config.sections import DataConfig
from harness.data.task_loader import TaskLoader
from harness.data.train_batches import train_batches
from harness.errors import CheckpointError, TaskError
from harness.run import run_in_world
from tests.support.helpers import ROOT, Pools, error_of, losses, tiny_config
from tests.tasks.loader_task import SIZE, Global, Loader, Stateful, Streaming
from tests.tasks.tiny_task import Points


@pytest.fixture
def on_rank(monkeypatch: pytest.MonkeyPatch) -> Any:
    def set_rank(rank: int, ranks: int) -> None:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(ranks))

    return set_rank


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_of_this_ranks_samples_is_not_split_again(on_rank: Any, workers: int) -> None:
    seen = []
    for rank in range(2):
        on_rank(rank, 2)
        data, config = Streaming(48), DataConfig(micro_batch_size=SIZE, workers=workers)
        batches = train_batches(data, config, default_collate, 0, rank, 2)
        for _ in range(6):
            seen.append(next(batches)[0])
        assert batches.epoch == 1
        batches.close()
    points = Points(48).points
    assert {tuple(p.tolist()) for p in torch.cat(seen)} == {tuple(p.tolist()) for p in points}


class Numbers(IterableDataset):
    """So many samples; each worker yields its part, or all of them if they are not `divided`."""

    def __init__(self, samples: int, divided: bool = True):
        self.samples, self.divided = samples, divided

    def __len__(self) -> int:
        return self.samples

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info and self.divided else (0, 1)
        return iter(range(first, self.samples, step))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_workers_of_a_stream_lose_no_sample(workers: int) -> None:
    """2 workers of 5 samples make 4 micro-batches of at most 4; one alone makes 3 of them."""
    config = DataConfig(micro_batch_size=4, workers=workers)
    batches, resumed = (
        train_batches(Numbers(10), config, default_collate, 0, 0, 1) for _ in range(2)
    )
    for epoch in range(2):
        seen = []
        while batches.epoch == epoch:
            seen += next(batches).tolist()
        assert sorted(seen) == list(range(10))
    next(batches)
    resumed.load_state_dict(batches.state_dict() | {"world_size": 1})
    assert torch.equal(next(resumed), next(batches))
    batches.close()
    resumed.close()


def test_workers_that_all_yield_the_same_samples_are_refused() -> None:
    config = DataConfig(micro_batch_size=4, workers=2)
    batches = train_batches(Numbers(12, divided=False), config, default_collate, 0, 0, 1)
    with pytest.raises(TaskError, match=r"12 samples, but Numbers yields more .*get_worker_info"):
        for _ in range(3):
            next(batches)
    batches.close()


def test_a_stream_that_ends_early_is_an_error() -> None:
    batches = train_batches(Short(12), DataConfig(micro_batch_size=4), default_collate, 0, 0, 1)
    with pytest.raises(TaskError, match="length is 12 samples, but epoch 0 ended after 11"):
        for _ in range(4):
            next(batches)


class Short(Numbers):
    def __iter__(self) -> Iterator[int]:
        return iter(range(self.samples - 1))


def test_a_stream_continues_within_its_epoch(on_rank: Any) -> None:
    on_rank(0, 1)
    config = DataConfig(micro_batch_size=5)
    first, second = (
        train_batches(Streaming(48), config, default_collate, 0, 0, 1) for _ in range(2)
    )
    for _ in range(12):  # ten are an epoch, the last of them 3 samples
        next(first)
    second.load_state_dict(first.state_dict() | {"world_size": 1})
    assert second.epoch == 1
    assert torch.equal(next(second)[0], next(first)[0])


@pytest.mark.parametrize("kind", [Loader, Stateful, Streaming])
@pytest.mark.parametrize("ranks", [1, 4])
def test_a_ranks_position_is_refused_on_another_number_of_ranks(
    on_rank: Any, kind: Any, ranks: int
) -> None:
    on_rank(0, 2)
    config = DataConfig(micro_batch_size=SIZE)
    saved = train_batches(kind(48), config, default_collate, 0, 0, 2)
    next(saved)
    state = saved.state_dict() | {"world_size": 2}
    on_rank(0, ranks)
    resumed = train_batches(kind(48), config, default_collate, 0, 0, ranks)
    with pytest.raises(CheckpointError, match="is 1 batches into epoch 0 on each of 2 ranks, whi"):
        resumed.load_state_dict(state)


def test_an_epoch_begins_on_any_number_of_ranks(on_rank: Any) -> None:
    on_rank(0, 2)
    saved = TaskLoader(Loader(48), world_size=2)
    for _ in range(6):
        next(saved)
    on_rank(0, 1)
    resumed = TaskLoader(Loader(48), world_size=1)
    resumed.load_state_dict(saved.state_dict() | {"world_size": 2})
    assert resumed.epoch == 1 and torch.equal(next(resumed)[0], Points(48).points[:SIZE])


class Epochs(Stateful):
    """Is told its epoch."""

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def test_a_state_at_the_end_of_an_epoch_is_needed_on_other_ranks_only_without_set_epoch(
    on_rank: Any,
) -> None:
    on_rank(0, 2)
    states = []
    for kind in (Stateful, Epochs):
        saved = TaskLoader(kind(48), world_size=2)
        for _ in range(12):
            next(saved)
        states.append(saved.state_dict() | {"world_size": 2})
    on_rank(0, 1)
    with pytest.raises(CheckpointError, match="Stateful is without a `set_epoch`, and its state "):
        TaskLoader(Stateful(48)).load_state_dict(states[0])
    loader = Epochs(48)
    resumed = TaskLoader(loader)
    resumed.load_state_dict(states[1])
    assert torch.equal(next(resumed)[0], Points(48).points[:SIZE])
    assert (resumed.epoch, loader.epoch) == (2, 2)


def test_a_global_state_continues_on_any_number_of_ranks(on_rank: Any) -> None:
    on_rank(0, 2)
    saved = TaskLoader(Global(48), world_size=2)
    next(saved)
    on_rank(0, 1)
    resumed = TaskLoader(Global(48), world_size=1)
    resumed.load_state_dict(saved.state_dict() | {"world_size": 2})
    batches = [next(resumed)[0] for _ in range(10)]
    assert torch.equal(torch.cat(batches), Points(48).points[2 * SIZE :])
    assert resumed.epoch == 1
    on_rank(0, 3)
    with pytest.raises(CheckpointError, match="no position on 3"):
        TaskLoader(Global(48), 3).load_state_dict(saved.state_dict() | {"world_size": 2})


def test_a_run_resumes_a_ranks_own_loader_on_the_same_number_of_ranks_only(
    pools: Pools, tmp_path: Path
) -> None:
    task = {"path": str(ROOT / "tests/tasks/loader_task.py"), "args": {"kind": "stateful"}}

    def config(name: str, steps: int) -> Any:
        return tiny_config(tmp_path / name, 1, task=task, run={"steps": steps})

    pools(2).run(run_in_world, config("whole", 5))
    pools(2).run(run_in_world, config("resumed", 2))
    errors = pools(1).run(error_of, config("resumed", 5))
    assert "cannot resume train_data on 1 rank: Stateful is 2 batches into epoch 0" in errors[0]
    pools(2).run(run_in_world, config("resumed", 5))
    assert losses(config("resumed", 5)) == losses(config("whole", 5))
