"""What a run has in host memory, and who frees it."""

import multiprocessing
from pathlib import Path

import pytest

from harness import memory_files
from harness.files import locked


def test_memory_of_a_run_in_progress_is_not_freed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_files, "SHARED", tmp_path / "shm")
    runs = [tmp_path / name for name in ("a", "b")]
    memories = [memory_files.memory_directory(run) for run in runs]
    for memory in memories:
        memory.mkdir(parents=True)
    (runs[1] / "control").mkdir(parents=True)
    with locked(runs[0] / "control/lock"):
        context = multiprocessing.get_context("fork")  # a process may take its own lock again
        for run in runs:
            process = context.Process(target=memory_files.remove_unused_memory, args=(run,))
            process.start()
            process.join()
    assert [memory.exists() for memory in memories] == [True, False]
    assert memories[0] != memories[1]
