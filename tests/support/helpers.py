"""Shared by several test files: a tiny run's config, and what a run has left in its directory."""

import json
import re
import subprocess
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.config import Config
from harness.config.sections import merge
from harness.errors import HarnessError
from harness.io import load
from harness.io.stored import materialize, read_tensor
from harness.run import run_in_world
from harness.testing.pool import RankPool
from harness.zero.reader import SavedEngine

ROOT = Path(__file__).parents[2]
Pools = Callable[[int], RankPool]
"""The fixture `pools`: by the number of ranks."""

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


def without_times(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without what differs from run to run."""
    return [
        {
            key: value
            for key, value in record.items()
            if not re.search("time|memory|per_s$|slowest_rank", key)
        }
        for record in found
    ]


def log_text(config: Config) -> str:
    """log.txt."""
    return (config.run_dir / "log.txt").read_text()


def checkpoint(config: Config, step: int) -> Path:
    """The directory of a step's checkpoint."""
    return config.run_dir / f"checkpoints/step-{step:08d}"


def exports(config: Config, step: int | None = None) -> Path:
    """The directory of a step's exports; by default the last step's."""
    return config.run_dir / f"exports/step-{step or config.run.steps:08d}"


def exported(config: Config, step: int | None = None, file: str = "net.sft") -> dict[str, Tensor]:
    """The weights in an exported file, by name."""
    return load(exports(config, step) / file)


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Fails unless both are the same tensors, to the bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def assert_same_optimizer(found: SavedEngine, expected: SavedEngine) -> None:
    """Fails unless masters, state and settings of the optimizer are the same, by parameter."""
    assert found.shapes == expected.shapes
    for name in expected.shapes:
        assert torch.equal(read_tensor(found.master(name)), read_tensor(expected.master(name))), (
            name
        )
        assert set(found.state_keys(name)) == set(expected.state_keys(name))
        for key in expected.state_keys(name):
            state = (read_tensor(saved.moment(name, key)) for saved in (found, expected))
            assert torch.equal(*state), (name, key)
        assert materialize(found.scalars(name)) == materialize(expected.scalars(name))
        assert found.group_of(name) == expected.group_of(name)
    groups, expected_groups = (
        [{**group, "fused": None} for group in materialize(saved.groups)]  # of the layout
        for saved in (found, expected)
    )
    assert groups == expected_groups


def tensor_crcs(path: Path) -> dict[str, int]:
    """The CRC-32 of every tensor in a `.pt`."""
    with zipfile.ZipFile(path) as archive:
        return {item.filename: item.CRC for item in archive.infolist() if "/data/" in item.filename}


def flip_bit(path: Path, at: int | None = None) -> None:
    """Damages a file: the lowest bit of one byte, by default the middle one."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    path.write_bytes(data)


def error_of(config: Config) -> str:
    """The error that a run on this rank reports to the user; empty if there is none."""
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
