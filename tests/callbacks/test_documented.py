"""The callbacks of docs/callbacks.md, as they stand there."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.config import Config
from harness.run import run_in_world
from harness.task import Task
from harness.testing.pool import RankPool
from tests.support.helpers import ROOT, log_text, records, tiny_config
from tests.tasks import tiny_task


def documented(name: str) -> Any:
    """A class of the page; checks that it is short."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/callbacks.md").read_text(), re.DOTALL)
    (block,) = (block for block in blocks if f"class {name}" in block)
    lines = [line for line in block.partition("class")[2].splitlines() if line.strip()]
    assert len(lines) < 20
    names: dict[str, Any] = {}
    exec(block, names)
    return names[name]


def with_both(config: Config) -> None:
    inputs = [torch.eye(6), torch.zeros(6, dtype=torch.long)]
    samples = documented("Samples")("net", inputs, config.run_dir / "samples.txt")
    callbacks = [documented("StopOnPlateau")(steps=3), samples]
    task = tiny_task.build(config)
    run_in_world(config, None, lambda config: Task(**{**vars(task), "callbacks": callbacks}))


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_the_examples_stop_a_run_and_write_samples(
    two_ranks: RankPool, tmp_path: Path, stage: int
) -> None:
    optimizer = {"net": {"optimizer": {"lr": 0.0}}}
    config = tiny_config(
        tmp_path, stage, run={"steps": 99}, trainer={"eval_every": 4}, engines=optimizer
    )
    two_ranks.run(with_both, config)
    assert len(records(config)) < 99
    assert "the run is to end: the loss is on a plateau of 1." in log_text(config)
    lines = (config.run_dir / "samples.txt").read_text().splitlines()
    assert lines[0].startswith("step 0: [") and lines[1] == lines[0].replace("step 0", "step 4")
