"""`--dry-run`: what it shows is what the run then does, and it writes nothing."""

import re
from pathlib import Path

import pytest

from harness.config import Config
from harness.dry_run import tried
from harness.run import run_in_world
from harness.testing.pool import RankPool
from tests.support.helpers import ROOT, records, tiny_config
from tests.support.quick import quick


def lines_of(config: Config) -> list[str]:
    return list(tried(config))


@pytest.mark.parametrize("stage", quick([0, 1, 2, 3], 3))
def test_its_step_is_the_runs_first_and_nothing_is_written(
    two_ranks: RankPool, tmp_path: Path, stage: int
) -> None:
    accumulation = {"net": {"ds_overrides": {"gradient_accumulation_steps": 2}}}
    config = tiny_config(tmp_path / "runs", stage, run={"steps": 1}, engines=accumulation)
    lines, _ = two_ranks.run(lines_of, config)
    text = "\n".join(lines)
    assert not any(tmp_path.iterdir())
    assert max(map(len, lines)) <= 80 or str(tmp_path) in max(lines, key=len)
    assert "run 'tiny' on 2 ranks" in text and "steps = 1" in text
    assert "engine net: 419 parameters, 419 trained" in text
    assert "a step: micro-batches 2" in text and "float32 [4, 6]" in text
    stages = [line.split() for line in lines if re.match(r" +\d ", line)]
    assert [row[0] for row in stages] == ["0", "1", "2", "3"]
    assert float(stages[0][1]) > float(stages[3][1])  # at stage 3 each rank has half
    two_ranks.run(run_in_world, config)
    (record,) = records(config)
    found = {
        line.split()[0]: line.split()[1] for line in lines if re.match(r"  \w+ [\d.e-]+$", line)
    }
    assert float(found["loss"]) == pytest.approx(record["loss"], rel=1e-5)
    assert float(found["grad_norm"]) == pytest.approx(record["grad_norm"], rel=1e-4)


def test_it_trains_every_engine_once(two_ranks: RankPool, tmp_path: Path) -> None:
    engine = tiny_config(tmp_path, 2).engines["net"].model_dump()
    table = tiny_config(tmp_path).model_dump()
    table |= {"engines": {"D": engine, "G": engine | {"train_every": 3}}}
    table |= {"task": {"path": str(ROOT / "tests/tasks/engines_task.py")}}
    lines, _ = two_ranks.run(lines_of, Config.model_validate(table))
    assert {"D/loss", "G/loss"} <= {line.split()[0] for line in lines if line}
    assert "could not be traced" not in "\n".join(lines)
