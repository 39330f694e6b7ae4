"""Runs on streams: ranks that end an epoch together, and what divides the data wrongly."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.config import Config
from harness.run import run_in_world
from tests.support.helpers import ROOT, Pools, error_of, exported, log_text, records, tiny_config
from tests.support.streams import order_of

TASK = str(ROOT / "tests/tasks/counting_task.py")


def config_of(
    directory: Path,
    kind: str,
    steps: int,
    accumulation: int = 1,
    sizes: Sequence[int] = (17, 6),
    **data: Any,
) -> Config:
    return tiny_config(
        directory,
        1,
        run={"steps": steps},
        task={
            "path": TASK,
            "args": {"kind": kind, "directory": str(directory), "sizes": list(sizes)},
        },
        engines={
            "net": {
                "optimizer": {"name": "torch.optim:SGD", "lr": 1.0, "weight_decay": 0.0},
                "ds_overrides": {
                    "gradient_accumulation_steps": accumulation,
                    "gradient_clipping": 0.0,
                },
            }
        },
        data=data,
    )


def expected_of_unequal(
    steps: int, accumulation: int, sizes: Sequence[int] = (17, 6), uneven: str = "pad"
) -> torch.Tensor:
    """The counts of one process: each step is the mean over the micro-batches of all ranks, of
    which some run out before others."""
    counts = torch.zeros(60)
    epoch, taken = 0, 0
    for _ in range(steps):
        order = torch.tensor(order_of(epoch, sum(sizes)))
        shares = [part.split(2) for part in order.split(list(sizes))]
        end = (max if uneven == "pad" else min)(map(len, shares))
        here = [b for share in shares for b in share[taken : min(taken + accumulation, end)]]
        for batch in here:
            counts[batch] -= 1 / len(batch) / len(here)
        taken += accumulation
        if taken >= end:
            epoch, taken = epoch + 1, 0
    return counts


@pytest.mark.parametrize("accumulation", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_unequal_ranks_end_an_epoch_together(
    pools: Pools, tmp_path: Path, accumulation: int
) -> None:
    """9 micro-batches on one rank and 3 on the other are an epoch of 9: none is lost or counts
    twice, also if the run is resumed when one rank has run out, or at the end of the epoch."""
    keys: Any = {"accumulation": accumulation, "micro_batch_size": 2}
    steps = 24 // accumulation
    epoch = -(-9 // accumulation)
    for stop in (1, epoch - 1, epoch, epoch + 1, steps):
        pools(2).run(run_in_world, config_of(tmp_path, "unequal", stop, **keys))
    config = config_of(tmp_path, "unequal", steps, **keys)
    expected = expected_of_unequal(steps, accumulation)
    assert torch.allclose(exported(config)["counts"], expected, atol=1e-6)
    found = records(config)
    assert [r["epoch"] for r in found] == [step // epoch for step in range(steps)]
    assert [r["skipped"] for r in found] == [0] * steps
    assert found[epoch - 1]["samples"] == 23


@pytest.mark.parametrize(
    ("kind", "sizes", "accumulation"),
    [
        ("unequal", (17, 6), 2),
        pytest.param("unequal", (17, 6), 1, marks=pytest.mark.slow),
        pytest.param("unequal", (9, 13, 6), 2, marks=pytest.mark.slow),
        pytest.param("unequal_loader", (17, 6), 2, marks=pytest.mark.slow),
        ("unequal_loader", (9, 13, 6), 1),
    ],
)
def test_an_epoch_stops_with_the_first_rank_that_runs_out(
    pools: Pools, tmp_path: Path, accumulation: int, sizes: Sequence[int], kind: str
) -> None:
    """3 micro-batches on one rank, and more on others, are an epoch of 3; also if the run is
    resumed within it, or at its end."""
    keys: Any = {"accumulation": accumulation, "micro_batch_size": 2, "sizes": sizes}
    keys |= {"uneven": "stop"}
    steps, epoch = 12 // accumulation, -(-3 // accumulation)
    for stop in (1, epoch, epoch + 1, steps):
        pools(len(sizes)).run(run_in_world, config_of(tmp_path, kind, stop, **keys))
    config = config_of(tmp_path, kind, steps, **keys)
    expected = expected_of_unequal(steps, accumulation, sizes, "stop")
    assert torch.allclose(exported(config)["counts"], expected, atol=1e-6)
    found = records(config)
    assert [r["epoch"] for r in found] == [step // epoch for step in range(steps)]
    assert found[epoch - 1]["samples"] == 6 * len(sizes)


@pytest.mark.parametrize("sizes", [(6, 0), pytest.param((0, 6, 2), marks=pytest.mark.slow)])
def test_a_rank_without_a_batch_ends_the_run_on_all(
    pools: Pools, tmp_path: Path, sizes: Sequence[int]
) -> None:
    config = config_of(tmp_path, "unequal", 2, micro_batch_size=2, sizes=sizes)
    errors = pools(len(sizes)).run(error_of, config)
    expected = f"rank {sizes.index(0)}: train_data: epoch 0 has no batch for this rank, one of"
    assert all(error.startswith(expected) for error in errors)
    assert not records(config)


@pytest.mark.parametrize("kind", ["loader", "stateful"])
def test_the_same_data_on_two_ranks_is_refused(pools: Pools, tmp_path: Path, kind: str) -> None:
    config = config_of(tmp_path, kind, 2, micro_batch_size=2)
    error, again = pools(2).run(error_of, config)
    assert error == again and "ranks [0, 1] have the same first micro-batch" in error
    assert "data.split = 'stride'" in error
    assert not records(config)


def test_a_stream_that_divides_itself_is_not_strided(pools: Pools, tmp_path: Path) -> None:
    config = config_of(tmp_path, "divided", 2, micro_batch_size=2, split="stride")
    errors = pools(2).run(error_of, config)
    assert all("Stateful begins with different samples on different ranks" in e for e in errors)


def test_ranks_that_shuffle_the_same_dataset_are_warned(pools: Pools, tmp_path: Path) -> None:
    config = config_of(tmp_path, "shuffling", 2)
    pools(2).run(run_in_world, config)
    assert "ranks [0, 1] shuffle the same dataset, so that its samples come" in log_text(config)


KINDS = ["stateful", "stateless", "map", "mixture", "tokens"]


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k == "stateful" else pytest.mark.slow) for k in KINDS]
)
def test_each_sample_comes_once_an_epoch_on_any_number_of_ranks(
    pools: Pools, tmp_path: Path, kind: str
) -> None:
    """2 -> 4 -> 3 -> 1 ranks with 0, 1, 2 and 0 workers; 12 samples a step, of which 5 are an
    epoch."""
    split = {"split": "stride"} if kind.startswith("state") else {}
    for stop, ranks, workers in ((3, 2, 0), (6, 4, 1), (11, 3, 2), (15, 1, 0)):
        keys: Any = {"micro_batch_size": 12 // ranks, "workers": workers, **split}
        config = config_of(tmp_path, kind, stop, **keys)
        pools(ranks).run(run_in_world, config)
    counts = exported(config)["counts"] * -12
    assert torch.allclose(counts, counts.round(), atol=1e-4)
    if kind == "mixture":  # each source has epochs of its own
        assert counts.sum().round() == 15 * 12
        assert counts[:20].max() - counts[:20].min() < 1.5
        assert counts[20:].max() - counts[20:].min() < 1.5
    else:
        assert counts.round().tolist() == [3.0] * 60
