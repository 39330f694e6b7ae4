"""What several test files need: a tiny run's config, and how to read what a run left."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from harness.config import Config
from harness.config.sections import merge
from harness.errors import HarnessError
from harness.run import run_in_world

ROOT = Path(__file__).parents[2]

OFFLOAD = {
    "zero_optimization": {"offload_optimizer": {"device": "cpu"}},
    "zero_force_ds_cpu_optimizer": False,
}
"""DeepSpeed keys: masters, moments and step on the CPU, with an optimizer of torch's."""


def tiny_config(directory: Path, stage: int = 0, **overrides: Any) -> Config:
    """A run of the tiny task at a ZeRO stage; `overrides` by section."""
    table = {
        "run": {"name": "tiny", "dir": directory, "steps": 6, "timeout_s": 30},
        "task": {"path": str(ROOT / "tests/tasks/tiny_task.py")},
        "engines": {
            "net": {
                "ds_config": ROOT / f"ds_configs/zero{stage}.json",
                "optimizer": {"name": "adamw", "lr": 1e-2, "weight_decay": 0.1},
            }
        },
        "data": {"micro_batch_size": 4},
        "control": {"stdin": False, "socket": False},
    }
    return Config.model_validate(merge(table, overrides))


def records(config: Config, prefix: str = "") -> list[dict[str, Any]]:
    """The steps of metrics.jsonl, or with prefix "eval/" its evaluations."""
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [r for r in found if any(k.startswith("eval/") for k in r) == bool(prefix)]


def losses(config: Config) -> list[float]:
    """The loss of every step in metrics.jsonl."""
    return [record["loss"] for record in records(config)]


def error_of(config: Config) -> str:
    """What a run on this rank tells the user; an empty string if all went well."""
    try:
        run_in_world(config)
    except HarnessError as error:
        return str(error)
    return ""


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[None]:
    """A file system of that size, like "60m", at `place`."""
    place.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs can be mounted by root only")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
