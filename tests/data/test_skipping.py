"""Samples that cannot be read: the run stops, or their micro-batch is smaller."""

from pathlib import Path
from typing import Any

import pytest
import torch

from harness.config import Config
from harness.config.sections import DataConfig
from harness.data.sampler import RandomSampler
from harness.data.train_batches import train_batches
from harness.errors import ConfigError
from harness.run import run_in_world
from tests.data.test_stream_runs import TASK
from tests.support.helpers import Pools, error_of, exported, log_text, records, tiny_config
from tests.support.streams import Shuffled
from tests.tasks.counting_task import LENGTH, Numbers

BAD = [3, 4, 17, 30, 31, 32, 59]
SIZE = 3


def config_of(directory: Path, steps: int, bad: list[int], **data: Any) -> Config:
    return tiny_config(
        directory,
        1,
        run={"steps": steps},
        task={"path": TASK, "args": {"kind": "map", "bad": bad}},
        engines={
            "net": {
                "optimizer": {"name": "torch.optim:SGD", "lr": 1.0, "weight_decay": 0.0},
                "ds_overrides": {"gradient_clipping": 0.0},
            }
        },
        data={"micro_batch_size": SIZE, "on_error": "skip"} | data,
    )


def plain(steps: int, bad: list[int], ranks: int) -> tuple[torch.Tensor, list[int]]:
    """The counts of one process that takes the mean over all readable samples of each step; and
    how many it has skipped up to each."""
    draws = RandomSampler(LENGTH, seed=0).stream()
    counts, skipped, so_far = torch.zeros(LENGTH), [], 0
    for _ in range(steps):
        drawn = [next(draws) for _ in range(SIZE * ranks)]
        read = [index for index in drawn if index not in bad]
        for index in read:
            counts[index] -= 1 / len(read)
        so_far += len(drawn) - len(read)
        skipped.append(so_far)
    return counts, skipped


def test_what_is_left_of_a_step_is_trained_on_without_bias(pools: Pools, tmp_path: Path) -> None:
    """Resumed in between, with other workers; the count continues."""
    for stop, workers in ((7, 0), (25, 1)):
        pools(2).run(run_in_world, config_of(tmp_path, stop, BAD, workers=workers))
    config = config_of(tmp_path, 25, BAD)
    counts, skipped = plain(25, BAD, 2)
    assert torch.allclose(exported(config)["counts"], counts, atol=1e-6)
    assert [r["skipped_samples"] for r in records(config)] == skipped
    assert skipped[-1] > len(BAD)
    assert "skipped sample 17: OSError: 17.txt is damaged" in log_text(config)


def test_too_many_in_a_row_end_the_run_on_all_ranks(pools: Pools, tmp_path: Path) -> None:
    keys: Any = {"sampler": "ordered", "most_skipped": 2}
    bad = [18, 20, 22]  # in the fourth step, all three on rank 0
    errors = pools(2).run(error_of, config_of(tmp_path, 9, bad, **keys))
    expected = "rank 0: data.most_skipped = 2: more samples in a row could not be read; the last is"
    assert all(error.startswith(f"{expected} sample 22: OSError") for error in errors)
    config = config_of(tmp_path, 9, bad, **keys | {"most_skipped": 3})
    assert [r["step"] for r in records(config)] == [1, 2, 3]
    pools(2).run(run_in_world, config)  # from what was saved
    assert records(config)[-1]["skipped_samples"] == 3


@pytest.mark.parametrize(("start", "workers"), [(0, 0), (12, 1)])
def test_a_rank_without_a_readable_sample_ends_the_run_on_all(
    pools: Pools, tmp_path: Path, start: int, workers: int
) -> None:
    """At the first step, or at the third, before which the run is saved."""
    keys: Any = {"sampler": "ordered", "most_skipped": 8, "workers": workers}
    errors = pools(2).run(error_of, config_of(tmp_path, 9, list(range(start, 60)), **keys))
    text = "data.on_error = 'skip': no sample of a micro-batch can be read, nor one of the 8 after"
    assert all(error.startswith(text) and "txt is damaged" in error for error in errors)
    config = config_of(tmp_path, 9, [], **keys)
    assert [r["step"] for r in records(config)] == ([1, 2] if start else [])
    assert (config.run_dir / "checkpoints/latest").exists() == bool(start)


def test_samples_before_a_resume_are_not_in_a_row_with_those_after() -> None:
    keys = {"micro_batch_size": 2, "sampler": "ordered", "on_error": "skip", "most_skipped": 2}
    config = DataConfig.model_validate(keys)
    batches = train_batches(Numbers(8, bad=[2, 3]), config, list, 0, 0, 1)
    next(batches)
    before = batches.state_dict()
    for _ in range(3):
        batches.load_state_dict(before)
        next(batches)


class WithLocate(Numbers):
    def locate(self) -> str:
        return "a method of the user's"


def test_a_method_of_the_datasets_is_not_called() -> None:
    config = DataConfig(on_error="skip", sampler="ordered", micro_batch_size=2)
    assert next(train_batches(WithLocate(8, bad=[0]), config, list, 0, 0, 1)) == [1]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_micro_batch_without_any_sample_counts_for_nothing(
    workers: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logging.Logger.propagate", True, raising=False)
    keys = {"micro_batch_size": 2, "sampler": "ordered", "on_error": "skip", "workers": workers}
    data = {"a": Numbers(4, bad=[1]), "b": Numbers(30, first=4, bad=[0, 1])}
    mixed = train_batches(data, DataConfig(on_error="skip"), list, 0, 0, 1)
    for _ in range(6):
        next(mixed)
    assert "skipped sample 5 (item 1 of 'b'): OSError: 1.txt is damaged" in caplog.text
    config = DataConfig.model_validate(keys)
    batches = train_batches(Numbers(8, bad=[2, 3, 5]), config, list, 0, 0, 1)
    found = [(next(batches), batches.share) for _ in range(4)]
    batches.close()
    assert found == [([0, 1], 1.0), ([4], 0.0), ([4], 0.5), ([6, 7], 1.0)]


def test_a_stream_cannot_skip() -> None:
    config = DataConfig(on_error="skip")
    with pytest.raises(ConfigError, match="train_data is a Shuffled, expected a map-style"):
        train_batches(Shuffled(8), config, list, 0, 0, 1)
