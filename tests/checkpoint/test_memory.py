"""The newest state in host memory: a run whose processes have died starts from there; what is torn
is never used. A node is a rank with its own disk, as in test_disks, and its own memory below it."""

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness import memory_files
from harness.checkpoint.manifest import is_safe, read_manifest
from harness.checkpoint.memory import Memory
from harness.checkpoint.remote_store import remote_name
from harness.config import Config
from harness.convert.run_checkpoints import saved_at
from harness.files import json_write
from harness.run import run_in_world
from harness.testing.faults import fail_at
from harness.testing.pool import RankError, RankPool
from tests.checkpoint.test_disks import config_of, log_of, losses_of, on, place, run_on, tensors
from tests.checkpoint.test_remote import list_fails
from tests.support.helpers import (
    Pools,
    assert_equal,
    error_of,
    exported,
    flip_bit,
    small_disk,
)


def remembering(stage: int = 2, **overrides: Any) -> Config:
    settings = {"in_memory_every": 1} | overrides.pop("checkpoint", {})
    return config_of(stage, checkpoint=settings, trainer={"save_every": 4}, **overrides)


def in_own_memory(function: Callable[..., Any], *args: Any) -> Any:
    """Calls the function with `shm` below the working directory instead of /dev/shm, and waits for
    the copies of each step before the next one is saved."""

    def copied(memory: Memory) -> bool:
        while memory._copies is not None and memory._copies.needs:
            memory.poll()
            time.sleep(0.005)
        return False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Memory, "is_copying", property(copied))
        patch.setattr(memory_files, "SHARED", Path("shm"))
        Path("shm").mkdir(exist_ok=True)
        return function(*args)


def run_pool(pool: RankPool, hosts: str, root: Path, function: Any, *args: Any) -> list[Any]:
    return pool.run(on, hosts, root, in_own_memory, function, *args)


def killed_in(phase: str, details: dict[str, Any], config: Config) -> None:
    with fail_at(phase, **{"rank": 1, "kind": "kill"} | details):
        run_in_world(config)


def kept(root: Path, host: str = "a") -> list[str]:
    """The names of what a node's memory has."""
    return sorted(path.name for path in (root / host / "shm").glob("*/checkpoints/*"))


@pytest.fixture(scope="module")
def uninterrupted(pools: Pools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("uninterrupted")
    pools(2).run(on, "aa", root, run_in_world, config_of(trainer={"save_every": 4}))
    return root


def assert_goes_on(root: Path, uninterrupted: Path, step: int, place: str) -> None:
    """The run has ended as one that was not interrupted, and its memory is free."""
    assert f"resumed from {place}" in log_of(root)
    assert f"/checkpoints/step-{step:08d}" in log_of(root).rpartition("resumed from")[2]
    assert losses_of(root) == losses_of(uninterrupted)
    assert tensors(root) == tensors(uninterrupted)
    for shared in root.glob("?/shm"):
        assert not list(shared.iterdir())


@pytest.mark.parametrize(
    ("stage", "hosts"),
    [
        (2, "ab"),
        *(
            pytest.param(stage, hosts, marks=pytest.mark.slow)
            for stage in (0, 1, 2, 3)
            for hosts in ("aa", "ab")
            if (stage, hosts) != (2, "ab")
        ),
    ],
)
def test_a_dead_process(pools: Pools, tmp_path: Path, stage: int, hosts: str) -> None:
    """On one node, and on two of which the second is lost with its disk and its memory."""
    reference = tmp_path / "reference"
    pools(2).run(on, "aa", reference, run_in_world, config_of(stage, trainer={"save_every": 4}))
    with pytest.raises(RankError):
        details = {"step": 6}
        run_pool(pools(2), hosts, tmp_path, killed_in, "forward", details, remembering(stage))
    step = {"aa": 5, "ab": 4}[hosts]  # the last one's copies
    assert f"step-{step:08d}" in kept(tmp_path)
    on_disk = run_on(tmp_path).run_dir.glob("checkpoints/step-*")
    saves = [*tmp_path.glob("a/shm/*/checkpoints/step-*"), *on_disk]
    assert len(set(map(saved_at, saves))) == len(saves)  # the newest one is told by its time
    if hosts == "ab":
        (tmp_path / "b").rename(tmp_path / "lost")
    run_pool(pools(2), hosts, tmp_path, run_in_world, remembering(stage))
    assert "resumed from shm/harness-" in log_of(tmp_path)
    assert f"/checkpoints/step-{step:08d}" in log_of(tmp_path)
    assert losses_of(tmp_path) == losses_of(reference)
    assert_equal(exported(run_on(tmp_path)), exported(run_on(reference)))
    for shared in tmp_path.glob("?/shm"):
        assert not list(shared.iterdir())


@pytest.mark.parametrize(
    ("phase", "hosts", "rank"),
    [
        ("rename", "ab", 1),
        ("rename", "ab", 0),
        ("file", "aa", 1),
        ("manifest", "aa", 0),
        ("manifest", "ab", 1),
        ("rename", "aa", 0),
        ("latest", "ab", 1),
        ("receive", "ab", 0),
        ("safe", "ab", 1),
    ],
)
@pytest.mark.slow
def test_a_kill_while_it_is_written(
    pools: Pools, tmp_path: Path, uninterrupted: Path, phase: str, hosts: str, rank: int
) -> None:
    """What is torn is not used: the run goes on from the step before, or from this one; or from
    the disk, where the rank dies as late as in step 4, which is saved there."""
    details = {"rank": rank, "step": 3, "path": "shm"}
    with pytest.raises(RankError):
        run_pool(pools(2), hosts, tmp_path, killed_in, phase, details, remembering())
    run_pool(pools(2), hosts, tmp_path, run_in_world, remembering())
    resumed = log_of(tmp_path).rpartition("resumed from ")[2].splitlines()[0]
    step = int(resumed.rpartition("-")[2])
    assert step in (2, 3, 4)
    assert_goes_on(tmp_path, uninterrupted, step, "runs/tiny" if step == 4 else "shm/")


@pytest.fixture(scope="module")
def died(pools: Pools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one node, in whose memory is step 5, and on the disk step 4."""
    root = tmp_path_factory.mktemp("died")
    with pytest.raises(RankError):
        run_pool(pools(2), "aa", root, killed_in, "forward", {"step": 6}, remembering())
    shutil.copytree(root / "a", root / "as it was")
    return root


@pytest.fixture
def again(died: Path) -> Path:
    """That run, in the same place: what is in memory is found by its path."""
    shutil.rmtree(died / "a")
    shutil.rmtree(died / "store", ignore_errors=True)
    shutil.copytree(died / "as it was", died / "a")
    return died


def test_what_is_damaged_is_not_used(pools: Pools, again: Path, uninterrupted: Path) -> None:
    (file,) = (again / "a/shm").glob("*/checkpoints/step-00000005/rank-00001.pt")
    flip_bit(file)
    run_pool(pools(2), "aa", again, run_in_world, remembering())
    assert "step-00000005/rank-00001.pt: damaged" in log_of(again)
    assert_goes_on(again, uninterrupted, 4, "runs/tiny")


def test_a_start_from_another_checkpoint(pools: Pools, again: Path, uninterrupted: Path) -> None:
    run_pool(pools(2), "aa", again, run_in_world, remembering(run={"resume": "4"}))
    assert_goes_on(again, uninterrupted, 4, "runs/tiny")


@pytest.mark.parametrize("every", [1, 0])
def test_the_memory_of_another_run(
    pools: Pools, again: Path, uninterrupted: Path, every: int
) -> None:
    """The user has removed a run, and begins again under the same name."""
    shutil.rmtree(again / "a/runs")
    config = remembering(checkpoint={"in_memory_every": every})
    run_pool(pools(2), "aa", again, run_in_world, config)
    assert "resumed" not in log_of(again)
    assert losses_of(again) == losses_of(uninterrupted)
    assert not list((again / "a/shm").iterdir())


def test_a_memory_that_is_too_small(two_ranks: RankPool, tmp_path: Path) -> None:
    with small_disk(tmp_path / "a/shm", "100k"):
        config = remembering(task={"args": {"width": 100}})
        errors = run_pool(two_ranks, "aa", tmp_path, error_of, config)
    expected = "checkpoint.in_memory_every: it needs 0 MB in shm of a, where 0 MB are free: enlarge"
    assert all(expected in text for text in errors), errors
    assert not (tmp_path / "a/runs/tiny/metrics.jsonl").exists()


FAILS = {"step": 6, "rank": None, "kind": "raise"}


def test_a_start_that_fails_in_its_first_step(pools: Pools, again: Path) -> None:
    """It saves its starting point on the disk: memory is freed when somebody gives up."""
    with pytest.raises(RankError):
        run_pool(pools(2), "aa", again, killed_in, "forward", FAILS, remembering())
    assert "resumed from shm/harness-" in log_of(again)
    assert (again / "a/runs/tiny/checkpoints/step-00000005/manifest.json").exists()


def test_the_clock_is_set_back_before_a_start_from_memory(
    pools: Pools, again: Path, uninterrupted: Path
) -> None:
    """What is saved after the state in memory is newer."""
    (kept,) = (again / "a/shm").glob("*/checkpoints/step-00000005")
    at = saved_at(kept) + 1000.0
    replace(read_manifest(kept), saved_at=at).write(kept)
    run_pool(pools(2), "aa", again, run_in_world, remembering())
    assert_goes_on(again, uninterrupted, 5, "shm/")
    assert saved_at(again / "a/runs/tiny/checkpoints/step-00000006") > at


def test_the_newest_on_the_disk_is_copied_too(pools: Pools, again: Path) -> None:
    """Although the run starts from memory."""
    config = remembering(checkpoint={"remote": f"file://{again}/store"}, run={"steps": 6})
    settings = config.trainer.model_copy(update={"save_at_end": False})
    config = config.model_copy(update={"trainer": settings})
    run_pool(pools(2), "aa", again, run_in_world, config)
    assert "resumed from shm/harness-" in log_of(again)
    (stored,) = again.glob("store/tiny/step-*/manifest.json")
    assert stored.parent.name.startswith("step-00000004.")


def stored(root: Path, **changes: Any) -> Path:
    """Step 4, in a store alone."""
    directory = place(root, "a", 4)
    manifest = replace(read_manifest(directory), **changes)
    manifest.write(directory)
    target = root / "store/tiny" / remote_name(directory, manifest)
    target.parent.mkdir(parents=True, exist_ok=True)
    return directory.rename(target)


def test_the_disk_is_not_read_for_a_start_from_memory(pools: Pools, again: Path) -> None:
    """Where the store has what the disk has: it is damaged, and stays so."""
    shutil.copytree(stored(again), place(again, "a", 4))
    flip_bit(place(again, "a", 4) / "rank-00001.pt")
    config = remembering(checkpoint={"remote": f"file://{again}/store"})
    run_pool(pools(2), "aa", again, run_in_world, config)
    assert "resumed from shm/harness-" in log_of(again)
    assert "damaged" not in log_of(again) and "downloading" not in log_of(again)


@pytest.mark.parametrize("is_down", [False, True])
def test_a_start_from_memory_alone(pools: Pools, again: Path, is_down: bool) -> None:
    """The disk has nothing, and the store is down, or has nothing good."""
    stored(again, finite=False)
    config = remembering(checkpoint={"remote": f"file://{again}/store"})
    function = list_fails if is_down else error_of
    assert run_pool(pools(2), "aa", again, function, config) == ["", ""]
    assert "resumed from shm/harness-" in log_of(again)


def test_latest_is_there_after_a_start_from_memory(pools: Pools, again: Path) -> None:
    """A rollback has dropped step 4 while this disk was away."""
    parent = again / "a/runs/tiny/checkpoints"
    at = saved_at(parent / "step-00000004")
    json_write([[at - 1e-3, at]], parent / "dropped.json")
    shutil.copytree(parent / "step-00000004", parent / "step-00000002")
    manifest = replace(read_manifest(parent / "step-00000004"), step=2, saved_at=at - 10)
    manifest.write(parent / "step-00000002")
    with pytest.raises(RankError):
        details = {"step": 6, "rank": 1}
        run_pool(pools(2), "aa", again, killed_in, "forward", details, remembering())
    assert "resumed from shm/harness-" in log_of(again)
    assert (parent / "latest").read_text() == "step-00000002\n"


@pytest.mark.slow
def test_a_fresh_node_gets_the_copies_of_the_disk_too(pools: Pools, tmp_path: Path) -> None:
    config = remembering(checkpoint={"replicas": 1})
    with pytest.raises(RankError):
        run_pool(pools(2), "ab", tmp_path, killed_in, "forward", {"step": 6}, config)
    (tmp_path / "b").rename(tmp_path / "lost")
    run_pool(pools(2), "ab", tmp_path, run_in_world, config)
    assert "resumed from shm/harness-" in log_of(tmp_path)
    for host in "ab":
        for step in (4, 6):
            directory = place(tmp_path, host, step)
            assert is_safe(directory, read_manifest(directory))
