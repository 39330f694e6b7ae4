"""The distribution: what it is called, and what an installation without a clone can run."""

import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import harness
from harness import provenance
from harness.checkpoint import manifest
from tests.support.helpers import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
COPIED = ("launch", "ds_configs")


def test_the_distribution_name_differs_from_the_one_on_the_index() -> None:
    assert PROJECT["project"]["name"] == "deepspeed-harness"
    assert version("deepspeed-harness") == PROJECT["project"]["version"] == harness.__version__


def test_a_checkout_that_is_not_installed_knows_its_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A save, and the record of a start, have it: `PYTHONPATH=. python launch/train.py`."""

    def of_others(name: str) -> str:
        if "harness" in name:
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr("importlib.metadata.version", of_others)
    monkeypatch.setattr(provenance, "version", of_others)
    assert provenance.versions()["harness"] == harness.__version__
    assert manifest._versions()["harness"] == harness.__version__


def test_the_distribution_contains_launch_and_ds_configs() -> None:
    data_files: dict[str, list[str]] = PROJECT["tool"]["setuptools"]["data-files"]
    installed = {
        f"{folder}/{path.name}": path.relative_to(ROOT).as_posix()
        for folder, patterns in data_files.items()
        for pattern in patterns
        for path in ROOT.glob(pattern)
        if path.is_file()
    }
    files = {
        path.relative_to(ROOT).as_posix()
        for folder in COPIED
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert installed == {f"share/harness/{path}": path for path in files}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_installed_wheel_trains_the_default_task_without_the_clone(tmp_path: Path) -> None:
    source, venv, runs = tmp_path / "source", tmp_path / "venv", tmp_path / "runs"
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("harness", *COPIED):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    python = [sys.executable, "-m"]
    run([*python, "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source])
    run([*python, "venv", "--without-pip", venv])
    (wheel,) = tmp_path.glob("deepspeed_harness-*.whl")
    python = [venv / "bin/python", "-c"]
    pip = [sys.executable, "-m", "pip", "--python", venv / "bin/python"]
    run([*pip, "install", "--no-deps", wheel])
    data, packages = run(
        [*python, "import sysconfig as s; print(s.get_path('data'), s.get_path('purelib'))"]
    ).split()
    # The dependencies, but for the clone, which is installed there by another .pth.
    (Path(packages) / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    found = run([*python, "import harness; print(harness.__file__)"])
    assert found.startswith(packages)
    assert "convert" in run([venv / "bin/harness", "--help"])
    shutil.copytree(Path(data) / "share/harness", runs)
    words = ["--config", "launch/tasks/byte_lm.toml", "--run.steps=2", "--control.stdin=false"]
    words += ["--task.args={seq_len=32, dim=16, layers=1, heads=1}", "--trainer.eval_every=0"]
    run([venv / "bin/python", "launch/train.py", *words], runs)
    assert (runs / "runs/byte_lm/checkpoints/step-00000002/manifest.json").is_file()
    described = run([venv / "bin/harness", "inspect", "runs/byte_lm"], runs)
    assert "step-00000002" in described


def run(command: list[str | Path], directory: Path | None = None) -> str:
    """Runs a program, in the root by default; what it printed. Fails if it does."""
    done = subprocess.run(
        command, cwd=directory or "/", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
