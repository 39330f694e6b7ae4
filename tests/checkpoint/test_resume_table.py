"""The claim of docs/resume.md: a resumed run is the uninterrupted one, bit for bit.

Each case has dropout, a schedule and gradient accumulation, stops in the middle of an epoch, and
continues past its end. Compared are all losses, learning rates and gradient norms, and the CRCs of
every tensor in the last checkpoint: weights, optimizer state and random generators. The table:

    python -m pytest tests/checkpoint/test_resume_table.py --slow -s
"""

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest

from harness.run import run_in_world
from harness.testing.pool import RankPool
from tests.support.helpers import Pools, checkpoint, log_text, records, tensor_crcs, tiny_config

STAGES = [0, 1, 2, 3]
DTYPES = ["fp32", "bf16"]
SAMPLERS = ["random", "ordered", "pool", "batched"]
WORKERS = [0, 2]
CASES = list(itertools.product(STAGES, DTYPES, SAMPLERS, WORKERS))
FEW = [case for number, case in enumerate(CASES) if number % 11 == 0]  # every value of each column


def history(
    pool: RankPool, directory: Path, stage: int, dtype: str, sampler: str, workers: int
) -> list[tuple[list[Any], dict[str, dict[str, int]]]]:
    """Of a run, and of it resumed: `(numbers of all steps, CRCs of all tensors)`."""
    overrides = {"bf16": {"enabled": dtype == "bf16"}, "gradient_accumulation_steps": 2}
    config = tiny_config(
        directory,
        stage,
        run={"steps": 11 if pool.world_size == 2 else 16},
        task={"args": {"dropout": 0.2}},
        engines={"net": {"scheduler": {"name": "cosine"}, "ds_overrides": overrides}},
        data={"sampler": sampler, "workers": workers},
        trainer={"save_every": 4, "export_at_end": False},
    )
    found = []
    for _ in range(2):
        pool.run(run_in_world, config)
        last = checkpoint(config, config.run.steps)
        numbers = [
            (record["loss"], record["lr"], record["grad_norm"]) for record in records(config)
        ]
        found.append((numbers, {path.name: tensor_crcs(path) for path in last.rglob("*.pt")}))
        for path in (config.run_dir / "checkpoints").glob("step-*"):
            if path.name > "step-00000004":
                shutil.rmtree(path)
    assert "resumed from" in log_text(config)
    assert records(config)[-1]["epoch"] >= 1
    return found


@pytest.mark.parametrize("case", FEW, ids=str)
def test_a_resumed_run_is_bit_identical(
    pools: Pools, tmp_path: Path, case: tuple[int, str, str, int]
) -> None:
    first, second = history(pools(2), tmp_path, *case)
    assert first == second


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_print_the_table(pools: Pools, tmp_path: Path) -> None:
    print("\n| ranks | ZeRO | dtype | sampler | workers | bit-equal |")  # noqa: T201
    print("|---|---|---|---|---|---|")  # noqa: T201
    different = []
    for number, (world_size, case) in enumerate(itertools.product([1, 2], CASES)):
        first, second = history(pools(world_size), tmp_path / str(number), *case)
        row = [world_size, *case, "yes" if first == second else "no"]
        print("| " + " | ".join(map(str, row)) + " |", flush=True)  # noqa: T201
        if first != second:
            different.append(row)
    assert not different
