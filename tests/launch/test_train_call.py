"""`harness.train` in a script that a launcher starts: two runs in a row on two ranks."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.helpers import ROOT
from tests.support.jobs import BIN, DEEPSPEED, TORCHRUN
from tests.support.slurm_cluster import Cluster, cluster, why_not

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SCRIPT = f"""
import os, sys, threading
from pathlib import Path
sys.path.insert(0, "{ROOT}")
from harness import train
from tests.test_api import build, tables

before = dict(os.environ)
for number in range(2):
    result = train(tables(Path(sys.argv[-1]), name="twice" if number else "once"), build)
    assert result.ended == "complete" and result.metrics["samples"] == 32, result
    assert result.exports.is_dir() and result.checkpoint.is_dir()
assert dict(os.environ) == before and threading.active_count() == 1, threading.enumerate()
import torch
assert not torch.distributed.is_initialized()
(Path(sys.argv[-1]) / f"done-{{os.environ.get('RANK', os.environ.get('SLURM_PROCID'))}}").touch()
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def done(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("done-*"))


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_ranks_of_a_launcher_train(launcher: str, script: Path, tmp_path: Path) -> None:
    words = {"deepspeed": [*DEEPSPEED[:-2]], "torchrun": TORCHRUN}[launcher]
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    command = [*words, str(script), str(tmp_path)]
    subprocess.run(command, env=environment, check=True, timeout=240)
    assert done(tmp_path) == ["done-0", "done-1"]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm")) as ours:
        yield ours


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_ranks_of_a_job_of_slurm_train(slurm: Cluster, script: Path, tmp_path: Path) -> None:
    command = ["srun", "-N", "2", "-n", "2", str(BIN / "python"), str(script), str(tmp_path)]
    subprocess.run(command, env=slurm.environment, check=True, timeout=240)
    assert done(tmp_path) == ["done-0", "done-1"]
