"""What a run directory tells of the code and the settings that a run was started from."""

import json
import subprocess
from pathlib import Path

from harness import __version__
from harness.provenance import commit_of
from harness.run import run_in_world
from harness.testing.pool import RankPool
from tests.support.helpers import tiny_config


def git(directory: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
    command = ["git", "-C", str(directory), *identity, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_of_a_task_and_whether_it_is_all_of_the_code(tmp_path: Path) -> None:
    task = tmp_path / "tasks/my_task.py"
    task.parent.mkdir()
    task.write_text("1\n")
    assert commit_of(task) is None
    git(tmp_path, "init", "-q")
    (tmp_path / "other.py").write_text("1\n")
    git(tmp_path, "add", "other.py")
    git(tmp_path, "commit", "-qm", "one")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert commit_of(task) == {"commit": commit, "dirty": True}  # not in git
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "two")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/log.txt").write_text("not code\n")
    clean = {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    assert commit_of(task) == clean
    (tmp_path / "other.py").write_text("2\n")
    assert commit_of(task) == clean | {"dirty": True}


def test_each_start_is_recorded(two_ranks: RankPool, tmp_path: Path) -> None:
    overrides = {"gradient_clipping": 0.25}
    config = tiny_config(
        tmp_path, 2, run={"steps": 1}, engines={"net": {"ds_overrides": overrides}}
    )
    two_ranks.run(run_in_world, config)
    two_ranks.run(run_in_world, config)
    first, second = map(json.loads, (config.run_dir / "starts.jsonl").read_text().splitlines())
    assert (first["step"], second["step"], first["ranks"], first["device"]) == (0, 1, 2, "cpu")
    assert first["versions"]["harness"] == __version__
    assert {"torch", "deepspeed", "python"} <= first["versions"].keys()
    resolved = json.loads((config.run_dir / "deepspeed/net.json").read_text())
    assert resolved["gradient_clipping"] == 0.25
    assert resolved["zero_optimization"]["stage"] == 2
    assert resolved["train_micro_batch_size_per_gpu"] == 4
