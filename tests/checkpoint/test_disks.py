"""Checkpoints where each node has only its own disk.

A node is here a rank with its own host name, and its own working directory, which contains the run
directory `runs/tiny`.
"""

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.checkpoint.copy_missing import copy_missing_files
from harness.checkpoint.disks import Disks, find_disks
from harness.checkpoint.inspect import describe_path
from harness.checkpoint.manifest import read_manifest
from harness.checkpoint.written import write_file
from harness.config import Config
from harness.convert.convert import Options, convert
from harness.convert.run_checkpoints import linked_in
from harness.distributed import broadcast, global_rank
from harness.errors import CheckpointError
from harness.io import load
from harness.run import run_in_world
from harness.testing.faults import fail_at, io_error
from harness.testing.pool import RankError, RankPool
from tests.support.helpers import (
    Pools,
    assert_equal,
    error_of,
    exported,
    log_text,
    losses,
    tensor_crcs,
    tiny_config,
)

MODEL = "mp_rank_00_model_states.pt"
SHARD = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"


def config_of(stage: int = 2, **overrides: Any) -> Config:
    table = {"trainer": {"save_every": 2}, "task": {"args": {"dropout": 0.2}}} | overrides
    return tiny_config(Path("runs"), stage, **table)


def on(hosts: str, root: Path, function: Callable[..., Any], *args: Any) -> Any:
    """Calls the function on this rank as on its node, of which `hosts` has the letter: in `root/a`,
    for instance."""
    host = hosts[global_rank()]
    was = Path.cwd()
    (root / host).mkdir(parents=True, exist_ok=True)
    os.chdir(root / host)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(socket, "gethostname", lambda: host)
            return function(*args)
    finally:
        os.chdir(was)


def place(root: Path, host: str, step: int) -> Path:
    return root / host / f"runs/tiny/checkpoints/step-{step:08d}"


def names(root: Path, host: str) -> list[str]:
    """The names in `checkpoints/` on a node's disk."""
    entries = place(root, host, 0).parent.iterdir()
    return sorted(path.name for path in entries if not path.is_symlink())


def files(root: Path, host: str, step: int = 6) -> set[str]:
    """The files of a checkpoint on a node's disk."""
    directory = place(root, host, step)
    return {str(path.relative_to(directory)) for path in directory.rglob("*.pt")}


def run_on(root: Path, host: str = "a") -> Config:
    """The run, as the node has it: rank 0's."""
    return tiny_config(root / host / "runs")


def log_of(root: Path) -> str:
    return log_text(run_on(root))


def losses_of(root: Path) -> list[float]:
    return losses(run_on(root))


def tensors(root: Path) -> dict[str, dict[str, int]]:
    """The CRC-32 of every tensor in step 6, on whichever disk."""
    paths = (path for host in "ab" for path in place(root, host, 6).rglob("*.pt"))
    return {path.name: tensor_crcs(path) for path in paths}


def remove(root: Path, step: int) -> None:
    for host in "ab":
        shutil.rmtree(place(root, host, step))


@pytest.fixture(scope="module")
def uninterrupted(two_ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run on two nodes."""
    root = tmp_path_factory.mktemp("uninterrupted")
    two_ranks.run(on, "ab", root, run_in_world, config_of())
    return root


@pytest.fixture
def root(uninterrupted: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return shutil.copytree(uninterrupted, tmp_path / "root", symlinks=True)


def disks_and_sum() -> tuple[Disks, int]:
    disks = find_disks(Path("runs/tiny"))
    return disks, disks.sum(10 ** global_rank())


@pytest.mark.parametrize(
    ("hosts", "sums"),
    [
        ("aaa", [111, 111, 111]),
        ("aba", [101, 10, 101]),
        ("abb", [1, 110, 110]),
        ("abc", [1, 10, 100]),
    ],
)
def test_which_ranks_share_a_disk_is_detected(
    three_ranks: RankPool, tmp_path: Path, hosts: str, sums: list[int]
) -> None:
    found = three_ranks.run(on, hosts, tmp_path, disks_and_sum)
    disks = Disks(tuple(hosts.index(host) for host in hosts))
    assert found == [(disks, number) for number in sums]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(("stage", "background"), [(0, True), (1, False), (2, True), (3, False)])
def test_each_node_writes_and_resumes_its_own_files(
    two_ranks: RankPool, tmp_path: Path, stage: int, background: bool
) -> None:
    config = config_of(stage, checkpoint={"background": background})
    shared = tiny_config(tmp_path / "shared", stage, task={"args": config.task.args})
    two_ranks.run(run_in_world, shared)
    two_ranks.run(on, "ab", tmp_path, run_in_world, config)
    ours, others = files(tmp_path, "a"), files(tmp_path, "b")
    assert "rank-00000.pt" in ours and "rank-00001.pt" in others and not ours & others
    before = tensors(tmp_path)
    remove(tmp_path, 6)
    two_ranks.run(on, "ab", tmp_path, run_in_world, config)
    assert "resumed from runs/tiny/checkpoints/step-00000004" in log_of(tmp_path)
    assert losses_of(tmp_path) == losses(shared)
    assert tensors(tmp_path) == before
    every_rank_reads = {f"net/{MODEL}"} if stage < 3 else set()
    assert files(tmp_path, "b", 4) == others | every_rank_reads
    for host in "ab":
        assert names(tmp_path, host) == ["latest", *(f"step-0000000{n}" for n in (2, 4, 6))]
        assert linked_in(place(tmp_path, host, 0).parent) == place(tmp_path, host, 6)
        left = {path.name for path in (tmp_path / host / "runs/tiny").iterdir()}
        assert {"log.txt", "checkpoints"} <= left
        assert ({"metrics.jsonl", "config.toml", "exports"} <= left) == (host == "a")


def test_ranks_that_have_changed_nodes(
    two_ranks: RankPool, root: Path, uninterrupted: Path
) -> None:
    remove(root, 6)
    shutil.copy(root / "a/runs/tiny/metrics.jsonl", root / "b/runs/tiny")
    two_ranks.run(on, "ba", root, train_in_small_chunks, config_of())
    assert losses(run_on(root, "b")) == losses_of(uninterrupted)
    assert tensors(root) == tensors(uninterrupted)


def train_in_small_chunks(config: Config) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.checkpoint.copy_missing.CHUNK", 1000)
        run_in_world(config)


def test_a_copy_of_another_file_is_refused(two_ranks: RankPool, tmp_path: Path) -> None:
    errors = two_ranks.run(on, "ab", tmp_path, copy_a_changed_file)
    assert all("x/.y.pt.tmp is not the file that was saved" in text for text in errors)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["y.pt"]


def copy_a_changed_file() -> str:
    directory, files = Path("x"), {}
    if global_rank() == 0:
        directory.mkdir()
        files["y.pt"] = write_file({"a": torch.zeros(9)}, directory / "y.pt")
        write_file({"a": torch.ones(9)}, directory / "y.pt")
    try:
        copy_missing_files(directory, broadcast(files), ["y.pt"])
    except CheckpointError as error:
        return str(error)
    return ""


# Kills and failures between two nodes


@pytest.mark.parametrize("rank", [0, 1])
def test_a_kill_between_the_commits_of_two_nodes(
    two_ranks: RankPool, tmp_path: Path, uninterrupted: Path, rank: int
) -> None:
    with pytest.raises(RankError, match="died with exit code -9"):
        two_ranks.run(on, "ab", tmp_path, killed_at_step_4, config_of(), rank)
    committed = ["step-00000004" in names(tmp_path, host) for host in "ab"]
    assert committed == [rank == 1, rank == 0]
    two_ranks.run(on, "ab", tmp_path, run_in_world, config_of())
    assert "resumed from runs/tiny/checkpoints/step-00000002" in log_of(tmp_path)
    assert losses_of(tmp_path) == losses_of(uninterrupted)
    assert tensors(tmp_path) == tensors(uninterrupted)
    assert names(tmp_path, "a") == names(tmp_path, "b") == names(uninterrupted, "a")


def killed_at_step_4(config: Config, rank: int) -> None:
    with fail_at("rename", step=4, rank=rank):
        run_in_world(config)


@pytest.mark.parametrize("how", ["kill", "error"])
def test_what_a_half_finished_commit_has_replaced_is_restored(
    two_ranks: RankPool, root: Path, uninterrupted: Path, how: str
) -> None:
    """Step 6, then the only one, is saved again: rank 0 commits, and rank 1 does not."""
    remove(root, 4)
    remove(root, 2)
    again = config_of(run={"steps": 8}, trainer={"save_every": 6}, checkpoint={"on_error": "stop"})
    if how == "kill":
        with pytest.raises(RankError, match="died with exit code -9"):
            two_ranks.run(on, "ab", root, save_again, again, {"rank": 1})
        assert "step-00000006.replaced.tmp" in names(root, "a")
    else:
        details = {"rank": 1, "kind": io_error}
        errors = two_ranks.run(on, "ab", root, save_again, again, details)
        assert all("cannot save" in text and "(injected)" in text for text in errors), errors
    assert errors_on(two_ranks, "ab", root, config_of()) == ["", ""]
    assert "skipped:" not in log_of(root)
    for host in "ab":
        assert names(root, host) == ["latest", "step-00000006"]
        assert read_manifest(place(root, host, 6)) == read_manifest(place(uninterrupted, host, 6))


def save_again(config: Config, details: dict[str, Any]) -> str:
    """Resumes, and takes no step before the next save, which fails."""
    with pytest.MonkeyPatch.context() as patch, fail_at("rename", **details):
        patch.setattr("harness.trainer.Trainer.step", lambda self: None)
        return error_of(config)


# Missing files are named


def errors_on(pool: RankPool, hosts: str, root: Path, config: Config) -> list[str]:
    return pool.run(on, hosts, root, error_of, config)


def lose_a_shard(root: Path) -> str:
    (place(root, "b", 6) / "net" / SHARD.format(1)).unlink()
    return f"net/{SHARD.format(1)} is missing, written by rank 1 on host b"


def lose_a_step(root: Path) -> str:
    shutil.rmtree(place(root, "b", 6))
    lost = f"rank-00001.pt, net/{SHARD.format(1)}"
    return f"step-00000006 on hosts a, b: {lost} are missing, written by rank 1 on host b"


def damage_all_copies(root: Path) -> str:
    """Also the file that was written first."""
    for host in "ab":
        path = place(root, host, 6) / "net" / MODEL
        path.write_bytes((place(root, "a", 6) / "net" / MODEL).read_bytes()[:-1])
    return f"runs/tiny/checkpoints/step-00000006/net/{MODEL}: damaged: "


def mix_saves(root: Path) -> str:
    path = place(root, "b", 6) / "manifest.json"
    path.write_text(path.read_text().replace('"saved_at": ', '"saved_at": 1'))
    return "step-00000006 is not from the same save on all nodes"


@pytest.mark.parametrize("damage", [lose_a_shard, lose_a_step, damage_all_copies, mix_saves])
def test_a_step_that_is_incomplete_over_all_nodes_is_skipped(
    two_ranks: RankPool, root: Path, uninterrupted: Path, damage: Callable[[Path], str]
) -> None:
    message = damage(root)
    two_ranks.run(on, "ab", root, run_in_world, config_of())
    (skipped,) = [line for line in log_of(root).splitlines() if "skipped:" in line]
    assert message in skipped
    assert "resumed from runs/tiny/checkpoints/step-00000004" in log_of(root)
    assert losses_of(root) == losses_of(uninterrupted)
    assert tensors(root) == tensors(uninterrupted)


def test_in_another_layout_each_node_gets_all_files(
    two_ranks: RankPool, root: Path, uninterrupted: Path
) -> None:
    theirs = f"net/{SHARD.format(1)}"
    alone = errors_on(two_ranks, "aa", root, config_of())
    lost = f"rank-00001.pt, {theirs} are missing, written by rank 1 on host b"
    for step in (2, 4, 6):
        assert all(f"step-0000000{step} on host a: {lost}" in text for text in alone), alone
    assert all("no checkpoint is complete" in text for text in alone)

    remove(root, 6)
    two_ranks.run(on, "ab", root, run_in_world, config_of(stage=1))
    assert log_of(root).count("resharded step") == 1
    for host in "ab":
        assert {f"net/{SHARD.format(rank)}" for rank in (0, 1)} < files(root, host, 4)
    assert losses_of(root) == pytest.approx(losses_of(uninterrupted), abs=1e-5)


def test_one_rank_resumes_where_all_files_are(pools: Pools, root: Path) -> None:
    remove(root, 6)
    shutil.copytree(place(root, "b", 4), place(root, "a", 4), dirs_exist_ok=True)
    config = config_of(3, data={"micro_batch_size": 8})
    assert pools(1).run(on, "a", root, error_of, config) == [""]
    assert "skipped:" not in log_of(root)
    assert "resumed from runs/tiny/checkpoints/step-00000004" in log_of(root)
    assert read_manifest(place(root, "a", 6)).hosts == ["a"]


def test_inspect_and_convert_list_missing_files(root: Path) -> None:
    ours, theirs = f"net/{SHARD.format(0)}", f"net/{SHARD.format(1)}"
    lines: list[str] = []
    with pytest.raises(
        CheckpointError, match="incomplete on this host: step-00000006, step-00000004, step"
    ):
        lines.extend(describe_path(root / "b/runs/tiny"))
    assert sum(f"{ours}  missing, written by rank 0 on host a" in line for line in lines) == 3
    assert sum(line.endswith(theirs) for line in lines) == 3
    lost = f"rank-00000.pt, net/{MODEL}, {ours} are missing, written by rank 0 on host a"
    with pytest.raises(CheckpointError, match=lost):
        list(describe_path(place(root, "b", 6)))
    target = root / "x.sft"
    for host, lost in (
        ("a", f"{theirs} is missing, written by rank 1 on host b"),
        ("b", f"net/{MODEL}, {ours} are missing, written by rank 0 on host a"),
    ):
        with pytest.raises(CheckpointError, match=lost):
            convert(root / host / "runs/tiny", target, Options(), print)
    shutil.copytree(place(root, "b", 6), place(root, "a", 6), dirs_exist_ok=True)
    assert "complete" in list(describe_path(place(root, "a", 6), verify=True))[-1]
    convert(root / "a/runs/tiny", target, Options(), print)
    assert_equal(load(target), exported(run_on(root)))


def test_retention_removes_on_every_node(two_ranks: RankPool, root: Path) -> None:
    shutil.rmtree(place(root, "a", 2))  # a kill has come between two removals
    config = config_of(run={"steps": 8}, checkpoint={"keep_last": 2})
    two_ranks.run(on, "ab", root, run_in_world, config)
    for host in "ab":
        assert names(root, host) == ["latest", "step-00000006", "step-00000008"]
