"""Jobs under torchrun that are killed, and resumed on other numbers of ranks and workers: each
sample is trained on once an epoch."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from harness.io import load
from tests.support.helpers import ROOT
from tests.support.jobs import TORCHRUN, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

STEPS = 60  # of 12 samples, of which 5 are an epoch
KINDS = {"map": "self", "tokens": "self", "mixture": "self", "stateful": "stride"}


def start(directory: Path, kind: str, ranks: int, workers: int) -> "subprocess.Popen[bytes]":
    toml = directory / "counting.toml"
    toml.write_text(f"""
        [run]
        dir = "{directory}/runs"
        steps = {STEPS}
        timeout_s = 60
        [task]
        path = "{ROOT}/tests/tasks/counting_task.py"
        args = {{ kind = "{kind}", directory = "{directory}", pause = 0.05 }}
        [engines.net]
        ds_config = "{ROOT}/ds_configs/zero1.json"
        optimizer = {{ name = "torch.optim:SGD", lr = 1.0, weight_decay = 0.0 }}
        ds_overrides = {{ gradient_clipping = 0.0 }}
        [data]
        split = "{KINDS[kind]}"
        [trainer]
        save_every = 3
    """)
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    words = [f"--data.micro_batch_size={12 // ranks}", f"--data.workers={workers}"]
    with (directory / "output").open("ab") as log:
        return subprocess.Popen(
            [*TORCHRUN[:-1], str(ranks), str(ROOT / "launch/train.py"), f"--config={toml}", *words],
            env=environment | {"PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
        )


@contextmanager
def killed_at_the_end(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Kills the launcher and everything below it at once."""
    try:
        yield
    finally:
        root = psutil.Process(process.pid)
        tree = [root, *root.children(recursive=True)]
        for one in tree:
            one.kill()
        process.wait()
        psutil.wait_procs(tree)


def steps_taken(directory: Path) -> int:
    metrics = directory / "runs/counting/metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_each_sample_comes_once_an_epoch(tmp_path: Path, kind: str) -> None:
    for stop, ranks, workers in ((8, 2, 0), (20, 4, 1), (34, 3, 2)):
        process = start(tmp_path, kind, ranks, workers)
        with killed_at_the_end(process):
            until(lambda stop=stop: steps_taken(tmp_path) >= stop, process, 300)
        assert stop <= steps_taken(tmp_path) < STEPS
    assert start(tmp_path, kind, 1, 0).wait(300) == 0
    output = (tmp_path / "output").read_text()
    assert output.count("resumed from") == 3
    found = load(tmp_path / f"runs/counting/exports/step-{STEPS:08d}/net.sft")
    counts = found["counts"] * -12
    assert torch.allclose(counts, counts.round(), atol=1e-4)
    if kind == "mixture":  # by size, each source with epochs of its own
        assert counts.sum().round() == STEPS * 12
        for source in (counts[:20], counts[20:]):
            assert source.max() - source.min() < 1.5
    else:
        assert counts.round().tolist() == [STEPS / 5] * 60
