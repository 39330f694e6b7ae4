"""The entry point as users start it: every launcher, every kind of stdin, every mistake."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness.distributed import free_port
from tests.helpers import ROOT

BIN = Path(sys.executable).parent
PYTHON = [sys.executable]
DEEPSPEED = [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", "0"]
TORCHRUN = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2"]
LAUNCHERS = {"python": PYTHON, "deepspeed": DEEPSPEED, "torchrun": TORCHRUN}


def start(
    launcher: str, directory: Path, *words: str, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs the entry point on the tiny task's config below `directory`, and waits for its end."""
    toml = directory / "tiny.toml"
    toml.write_text(
        f"""
        [run]
        dir = "{directory}/runs"
        steps = 4
        timeout_s = 60
        [task]
        path = "{ROOT}/tests/tiny_task.py"
        [engines.net]
        ds_config = "{ROOT}/ds_configs/zero2.json"
        optimizer = {{ name = "adamw", lr = 1e-2 }}
        """
    )
    launch = [str(free_port()) if word == "0" else word for word in LAUNCHERS[launcher]]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    process = subprocess.Popen(
        [*launch, str(ROOT / "launch/train.py"), "--config", str(toml), *words],
        env=environment | {"PATH": f"{BIN}:{os.environ['PATH']}"},
        cwd=directory,
        stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            out, err = process.communicate(stdin, timeout=100)
        finally:
            process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def steps_of(directory: Path) -> list[int]:
    lines = (directory / "runs/tiny/metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines if "eval/" not in line]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_commands_from_a_pipe_under_every_launcher(tmp_path: Path, launcher: str) -> None:
    done = start(launcher, tmp_path, "--run.steps=100000", stdin="lr 1e-4\nsave\nquit\n")
    assert done.returncode == 0, done.stderr
    obeyed = [
        line
        for line in done.stderr.splitlines()
        if "()" in line or "SetLr" in line or "Save(" in line
    ]
    told = [line.partition("INFO ")[2].partition(": ")[2] for line in obeyed]
    assert told == ["SetLr(lr=0.0001)", "Save(name=None)", "Quit()"], done.stderr
    last = steps_of(tmp_path)[-1]
    manifest = tmp_path / f"runs/tiny/checkpoints/step-{last:08d}/manifest.json"
    ranks = 1 if launcher == "python" else 2
    assert json.loads(manifest.read_text())["world_size"] == ranks


def test_without_stdin_it_trains_and_then_resumes(tmp_path: Path) -> None:
    assert start("deepspeed", tmp_path).returncode == 0
    again = start("deepspeed", tmp_path, "--run.steps=6", "--metrics.tensorboard=true")
    assert again.returncode == 0
    assert "resumed from" in again.stderr and "step 4 of 6 on 2 ranks" in again.stderr
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert list((tmp_path / "runs/tiny/tensorboard").glob("events.out.tfevents.*"))


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16_on_a_gpu(tmp_path: Path, stage: int) -> None:
    ds_config = f"--engines.net.ds_config={ROOT}/ds_configs/zero{stage}.json"
    fp16 = "--engines.net.ds_overrides.fp16={enabled=true, initial_scale_power=8}"
    done = start("python", tmp_path, ds_config, fp16, "--run.steps=40")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines if "eval/" not in line]
    assert steps[0]["loss_scale"] == 256
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]


@pytest.mark.skipif(shutil.which("nohup") is None, reason="nohup is not installed")
def test_in_the_background_under_nohup(tmp_path: Path) -> None:
    start("python", tmp_path, "--run.steps=1")
    command = (
        f"nohup {sys.executable} {ROOT}/launch/train.py --config tiny.toml >out 2>&1 & wait $!"
    )
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, timeout=100, check=False)
    assert done.returncode == 0, (tmp_path / "out").read_text()
    assert steps_of(tmp_path) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("launcher", "word", "code", "told"),
    [
        ("python", "--run.stesp=1", 2, "run.stesp (command line): unknown key (did you mean"),
        ("deepspeed", "--task.path=missing.py", 2, "missing.py"),
        ("deepspeed", "--task.args={raise=true}", 1, "RuntimeError: the task is unwell"),
        ("torchrun", "--task.args={samples=0}", 1, "train_data: Points has no items"),
        ("deepspeed", "--run.resume=broken", 2, "checkpoint broken: manifest.json is damaged"),
    ],
)
def test_a_mistake_is_one_message_and_an_exit_code(
    tmp_path: Path, launcher: str, word: str, code: int, told: str
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/manifest.json").write_text("{}")
    done = start(launcher, tmp_path, word)
    assert done.returncode == (1 if launcher == "torchrun" else code)
    assert done.stderr.count(told) == 1 and done.stderr.count("error: ") == 1, done.stderr
    # torchrun itself ends with a traceback; a task's own failure shows where it failed.
    tracebacks = {"torchrun": 1, "deepspeed": int(code == 1), "python": 0}[launcher]
    assert done.stderr.count("Traceback") <= tracebacks, done.stderr
    assert not (tmp_path / "runs").exists()
