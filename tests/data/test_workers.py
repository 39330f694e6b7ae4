"""Data-loader workers that fail: what failed, with which samples, and what helps."""

import os
import random
import signal
from typing import Any

import pytest
import torch
from torch.utils.data import default_collate

from harness.config.sections import DataConfig
from harness.data.batches import Batches
from harness.data.train_batches import train_batches
from harness.data.workers import note_remedy
from harness.errors import Kind, kind_of


class Numbers(torch.utils.data.Dataset):
    """The numbers from 0, each with a random one; some of them do something else when read."""

    def __init__(self, bad: int | None = None, death: int | None = None):
        self.bad, self.death = bad, death

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[int, float]:
        if index == self.bad:
            raise ValueError("a bad sample")
        if index == self.death:
            os.kill(os.getpid(), signal.SIGKILL)
        return index, random.random()


def refuse(samples: list[Any]) -> Any:
    raise ValueError("samples differ")


def batches_of(data: Any, collate: Any = default_collate, **settings: Any) -> Batches:
    config = DataConfig.model_validate({"micro_batch_size": 4, "sampler": "ordered"} | settings)
    return train_batches(data, config, collate, seed=0, rank=0, world_size=1)


def failure_of(batches: Batches, kind: Kind = "task", reads: int = 3) -> str:
    """Message and notes of the error of reading, which is of that kind."""
    try:
        for _ in range(reads):
            next(batches)
    except Exception as error:
        assert error.__traceback__ is not None
        error.__traceback__ = error.__traceback__.tb_next  # without this file
        assert kind_of(error) == kind
        note_remedy(error)
        return "\n".join([str(error), *getattr(error, "__notes__", ())])
    finally:
        batches.close()
    return ""


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_names_the_sample_and_its_micro_batch(workers: int) -> None:
    text = failure_of(batches_of(Numbers(bad=6), workers=workers))
    assert "a bad sample" in text
    assert text.count("while reading sample 6 of the samples 4, 5, 6, 7") == 1
    text = failure_of(batches_of(Numbers(), refuse, workers=workers))
    assert text.count("while collating the samples 0, 1, 2, 3") == 1


def test_a_killed_worker_is_told_with_a_remedy() -> None:
    text = failure_of(batches_of(Numbers(death=6), workers=1), kind="error")
    assert "killed by signal: Killed" in text or "exited unexpectedly" in text
    assert "smaller data.workers" in text


def test_the_samples_of_the_micro_batch_are_known() -> None:
    for workers in (0, 2):
        batches = batches_of(Numbers(), workers=workers)
        for number in range(8):  # over the end of an epoch
            assert next(batches)[0].tolist() == batches.samples
            assert batches.samples == [(4 * number + n) % 24 for n in range(4)]
        batches.close()


@pytest.mark.parametrize(
    ("message", "remedy"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible", "--shm-size"),
        ("unable to write to file </torch_7_1>: No space left on device (28)", "--shm-size"),
        ("received 0 items of ancdata", "ulimit -n"),
        ("DataLoader worker (pid(s) 7) exited unexpectedly", "smaller data.workers"),
        ("cannot pickle 'generator' object", 'data.start_method = "fork"'),
        ("No space left on device: /data/cache", ""),
        ("a bad sample", ""),
    ],
)
def test_known_errors_have_a_remedy(message: str, remedy: str) -> None:
    error = RuntimeError(message)
    note_remedy(error)
    notes = getattr(error, "__notes__", [])
    assert len(notes) == bool(remedy) and remedy in "".join(notes)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_every_start_method_reads_the_same(method: str) -> None:
    expected = batches_of(Numbers(), workers=1)
    found = batches_of(Numbers(), workers=1, start_method=method)
    for _ in range(3):
        for ours, theirs in zip(next(expected), next(found), strict=True):
            assert torch.equal(ours, theirs)
    expected.close()
    found.close()
