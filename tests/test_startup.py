"""Mistakes of machines and installations, found before step 1."""

import logging
import os
import resource
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from harness import distributed, startup
from harness.config import Config
from harness.errors import ConfigError, HarnessError
from harness.files import locked
from harness.run import run_in_world
from harness.task import Task
from harness.testing.pool import RankPool
from tests.support.forked import run_forked
from tests.support.helpers import tiny_config
from tests.support.jobs import written_config
from tests.tasks import tiny_task


def test_too_few_open_files_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (128, 128))
    startup.check_open_files(0)
    with pytest.raises(
        ConfigError, match=r"may open 128 files, but .* need about 198: .*ulimit -n"
    ):
        startup.check_open_files(4)


def test_a_small_shared_memory_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk = shutil._ntuple_diskusage(64 << 20, 0, 64 << 20)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk)
    logging.getLogger("harness").propagate = True
    startup.check_machine(0)
    assert "--shm-size" not in caplog.text
    startup.check_machine(2)
    assert "/dev/shm has 64 of 64 MiB free" in caplog.text and "--shm-size" in caplog.text


def test_a_stale_lock_of_a_compilation_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    logging.getLogger("harness").propagate = True
    for name, age in (("cpu_adam", 1200), ("fused_adam", 60)):
        lock = tmp_path / name / "lock"
        lock.parent.mkdir()
        lock.touch()
        at = time.time() - age
        os.utime(lock, (at, at))
    startup.check_machine(0)
    assert f"{tmp_path}/cpu_adam/lock is 20 minutes old" in caplog.text
    assert "fused_adam" not in caplog.text


def start_of(config: Config) -> list[str]:
    """What a rank logs in a start that fails, when it builds its task, and the error."""
    told: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    def build(config: Config) -> Task:
        told.append("build")
        return tiny_task.build(config)

    logger, handler = logging.getLogger("harness"), Handler()
    logger.addHandler(handler)
    try:
        run_in_world(config, build=build)
    except HarnessError as error:
        told.append(str(error))
    finally:
        logger.removeHandler(handler)
    return told


def test_a_directory_in_use_is_told_before_anything_is_built(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path)
    lock = config.run_dir / "control/lock"
    owner = f"process {os.getpid()} on {socket.gethostname()}"
    with locked(lock):
        first, other = two_ranks.run(start_of, config)
    assert first[0].startswith(f"{config.run_dir} is in use by {owner}: this start ")
    assert first[1] == "build" and f"in use by {owner}" in first[-1]
    assert other[0] == "build"
    first, _ = two_ranks.run(start_of, config)  # the file is there, but nobody has it
    assert first[0] == "build" and not any("in use" in text for text in first)


def check_with(name: str, difference: Any, directory: Path) -> str:
    """What the check of the ranks raises or logs, if rank 1 differs."""
    config = tiny_config(directory)
    logged: list[str] = []
    versions = startup._versions()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(startup.log, "warning", lambda text, *args: logged.append(text % args))
        if distributed.global_rank() == 1 and name == "clock":
            patch.setattr(startup.time, "time", lambda: time.monotonic() + difference)
        elif name == "clock":
            patch.setattr(startup.time, "time", time.monotonic)
        elif distributed.global_rank() == 1:
            patch.setattr(startup, "_versions", lambda: {**versions, name: difference})
        try:
            startup.check_ranks_alike(config)
        except ConfigError as error:
            return str(error)
    return " ".join(logged)


def test_ranks_with_other_software_are_refused(two_ranks: RankPool, tmp_path: Path) -> None:
    for error in two_ranks.run(check_with, "torch", "1.0", tmp_path):
        assert "the ranks run different code: torch is '1.0' on rank 1, and '" in error
    for error in two_ranks.run(check_with, "harness", "digest 0", tmp_path):
        assert "harness is 'digest 0' on rank 1" in error
    assert two_ranks.run(check_with, "torch", startup._versions()["torch"], tmp_path) == [""] * 2


def test_other_clocks_are_told_once(two_ranks: RankPool, tmp_path: Path) -> None:
    first, second = two_ranks.run(check_with, "clock", 90, tmp_path)
    assert "the clock of rank 1 on " in first and "is +90 s from rank 0's" in first
    assert second == ""


DIES = """
import os

def build(config):
    if os.environ["RANK"] == "1":
        os._exit(7)
    from tests.tasks import tiny_task
    return tiny_task.build(config)
"""


def test_a_rank_that_dies_as_it_builds_is_named_by_the_others(tmp_path: Path) -> None:
    task, output = tmp_path / "task.py", tmp_path / "output"
    task.write_text(DIES)
    words = ["--config", str(written_config(tmp_path)), f"--task.path={task}"]
    assert run_forked(2, words, output, 60) == [75, 7]
    host = socket.gethostname()
    text = f"error: {host} has lost rank 1 on {host}, which was in step 0, phase start: "
    assert text in output.read_text()


def test_the_tasks_code_is_compared(tmp_path: Path) -> None:
    path = tmp_path / "own_task.py"
    digests = []
    for text in ("x = 1\n", "x = 2\n"):
        path.write_text(text)
        config = tiny_config(tmp_path, task={"path": str(path)})
        digests.append(startup.software(config)[f"the task {path}"])
    assert digests[0] != digests[1]
