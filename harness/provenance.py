"""What a run was started from: the commit of its code, versions, command line: starts.jsonl."""

import os
import platform
import socket
import subprocess
import sys
import time
from contextlib import closing
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from harness import __version__, distributed
from harness.config import Config
from harness.files import JsonLines

FILE = "starts.jsonl"
"""Its name in the run directory: a line for each start."""
PACKAGES = ("deepspeed", "torch", "numpy", "safetensors", "pydantic", "transformers")
"""Those whose versions are recorded, if they are installed."""
SECONDS_FOR_GIT = 10.0


def record_start(config: Config, step: int) -> None:
    """Appends this start, at that step, to RUN_DIR/starts.jsonl. Raises OSError."""
    device = distributed.device()
    is_gpu = device.type == "cuda"
    with closing(JsonLines(config.run_dir / FILE)) as file:
        file.write(
            {
                "time": time.time(),
                "step": step,
                "command": [sys.executable, *sys.argv],
                "directory": str(Path.cwd()),
                "host": socket.gethostname(),
                "ranks": distributed.world_size(),
                "device": torch.cuda.get_device_name(device) if is_gpu else device.type,
                "versions": versions(),
                "git": commit_of(Path(config.task.path).absolute()),
            }
        )


def versions() -> dict[str, str]:
    """Of harness, Python, and the `PACKAGES`; on GPUs of CUDA."""
    found = {"harness": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found


def commit_of(task: Path) -> dict[str, Any] | None:
    """`{"commit": ..., "dirty": whether it is not all of the code}` of the repository that a task's
    file is in, or the working directory. None if there is no repository, or no git.

    Dirty: a file in git has changed, or the task's is not in git.
    """
    folder = task.parent if task.is_file() else Path.cwd()
    command = ["git", "-C", str(folder), "status", "--porcelain=v2", "--branch"]
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(
            command, capture_output=True, check=True, timeout=SECONDS_FOR_GIT, env=environment
        )
    except (OSError, subprocess.SubprocessError):
        return None
    lines = os.fsdecode(done.stdout).splitlines()
    commit = next((line.split()[-1] for line in lines if line.startswith("# branch.oid ")), None)
    untracked = [folder.resolve() / line[2:] for line in lines if line.startswith("? ")]
    is_changed = any(line[:1] in ("1", "2", "u") for line in lines)
    is_new = any(_is_in(task, path) for path in untracked)
    return {"commit": commit, "dirty": is_changed or is_new}


def _is_in(file: Path, path: Path) -> bool:
    return file.resolve().is_relative_to(path.resolve())
