"""The table of docs/resume.md: is a resumed run the uninterrupted one, bit for bit?

Each case has dropout, a schedule and gradient accumulation, stops in the middle of an epoch, and
goes on across its end. Compared are all losses, learning rates and gradient norms, and the CRCs of
every tensor in the last checkpoint: weights, optimizer state and random generators.

    python -m pytest tests/checkpoint/test_resume_table.py --slow -s
"""

import itertools
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.run import run_in_world
from harness.testing.pool import RankPool
from tests.support.helpers import records, tiny_config

STAGES = [0, 1, 2, 3]
DTYPES = ["fp32", "bf16"]
SAMPLERS = ["random", "ordered", "pool", "batched"]
WORKERS = [0, 2]
CASES = list(itertools.product(STAGES, DTYPES, SAMPLERS, WORKERS))
FEW = [case for number, case in enumerate(CASES) if number % 7 == 0]  # every value of each column


@pytest.fixture(scope="module")
def pools(two_ranks: RankPool) -> Iterator[dict[int, RankPool]]:
    with RankPool(1) as one:
        yield {1: one, 2: two_ranks}


def tensors(path: Path) -> dict[str, int]:
    """The CRC-32 of every tensor in a `.pt`."""
    with zipfile.ZipFile(path) as archive:
        return {item.filename: item.CRC for item in archive.infolist() if "/data/" in item.filename}


def history(
    pool: RankPool, directory: Path, stage: int, dtype: str, sampler: str, workers: int
) -> list[tuple[list[Any], dict[str, dict[str, int]]]]:
    """What a run and its resumption left: `(numbers of all steps, CRCs of all tensors)`."""
    overrides = {"bf16": {"enabled": dtype == "bf16"}, "gradient_accumulation_steps": 2}
    config = tiny_config(
        directory,
        stage,
        run={"steps": 11 if pool.world_size == 2 else 16},
        task={"args": {"dropout": 0.2}},
        engines={"net": {"scheduler": {"name": "cosine"}, "ds_overrides": overrides}},
        data={"sampler": sampler, "workers": workers},
        trainer={"save_every": 4, "export_on_quit": False},
    )
    found = []
    for _ in range(2):
        pool.run(run_in_world, config)
        last = config.run_dir / f"checkpoints/step-{config.run.steps:08d}"
        numbers = [
            (record["loss"], record["lr"], record["grad_norm"]) for record in records(config)
        ]
        found.append((numbers, {path.name: tensors(path) for path in last.rglob("*.pt")}))
        for path in (config.run_dir / "checkpoints").glob("step-*"):
            if path.name > "step-00000004":
                shutil.rmtree(path)
    assert "resumed from" in (config.run_dir / "log.txt").read_text()
    assert records(config)[-1]["epoch"] >= 1
    return found


@pytest.mark.parametrize("case", FEW, ids=str)
def test_a_resumed_run_is_the_same_to_the_bit(
    pools: dict[int, RankPool], tmp_path: Path, case: tuple[int, str, str, int]
) -> None:
    first, second = history(pools[2], tmp_path, *case)
    assert first == second


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_print_the_table(pools: dict[int, RankPool], tmp_path: Path) -> None:
    print("\n| ranks | ZeRO | dtype | sampler | workers | bit-equal |")  # noqa: T201
    print("|---|---|---|---|---|---|")  # noqa: T201
    different = []
    for number, (world_size, case) in enumerate(itertools.product([1, 2], CASES)):
        first, second = history(pools[world_size], tmp_path / str(number), *case)
        row = [world_size, *case, "yes" if first == second else "no"]
        print("| " + " | ".join(map(str, row)) + " |", flush=True)  # noqa: T201
        if first != second:
            different.append(row)
    assert not different
