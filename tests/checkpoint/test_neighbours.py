"""Copies on another node: what they survive, and that no checkpoint claims them that lacks them.

A node is a rank with its own disk, as in test_disks.
"""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness import distributed, recovery
from harness.checkpoint import copies
from harness.checkpoint.disks import Disks
from harness.checkpoint.files import verify_file
from harness.checkpoint.inspect import describe_path
from harness.checkpoint.manifest import Manifest, is_safe, read_manifest, unmark_safe
from harness.checkpoint.neighbours import neighbours_of, renew_marks
from harness.checkpoint.transfer import Receiver, send
from harness.checkpoint.written import write_file
from harness.config import Config
from harness.convert.dropped_saves import Dropped
from harness.convert.run_checkpoints import checkpoints_in
from harness.distributed.network import own_address
from harness.errors import CheckpointError, NonFiniteError
from harness.run import run_in_world
from harness.testing.faults import fail_at
from harness.testing.pool import RankError, RankPool
from tests.checkpoint.test_disks import config_of, log_of, on, place, run_on, tensors
from tests.checkpoint.test_dropped import copied_at_once
from tests.checkpoint.test_remote_store import manifest_of
from tests.support.helpers import Pools, assert_equal, exported, flip_bit, log_text


def replicated(stage: int = 2, steps: int = 6, resume: str = "latest", **overrides: Any) -> Config:
    settings = {"replicas": 1} | overrides.pop("checkpoint", {})
    run = {"steps": steps, "resume": resume}
    return config_of(stage, checkpoint=settings, run=run, **overrides)


def claims(root: Path, host: str) -> list[int]:
    """The steps of the checkpoints on a node that claim to be safe, all of whose files are intact
    there, as of two nodes each has everything."""
    steps = []
    for directory in checkpoints_in(root / host / "runs/tiny/checkpoints"):
        manifest = read_manifest(directory)
        if is_safe(directory, manifest):
            for name, entry in manifest.files.items():
                verify_file(directory / name, entry)
            steps.append(manifest.step)
    return sorted(steps)


@pytest.mark.parametrize(
    ("stage", "background", "lost"),
    [
        (2, True, "b"),
        *(
            pytest.param(stage, stage == 1, lost, marks=pytest.mark.slow)
            for stage in (0, 1, 3)
            for lost in "ab"
        ),
    ],
)
def test_a_lost_node(pools: Pools, tmp_path: Path, stage: int, background: bool, lost: str) -> None:
    """A fresh one gets its files from the copies, and the run goes on to the bit; so does what is
    left, alone."""
    settings = {"background": background}
    pools(2).run(on, "ab", tmp_path / "reference", run_in_world, config_of(stage))
    half = replicated(stage, 4, checkpoint=settings)
    pools(2).run(on, "ab", tmp_path, run_in_world, half)
    assert claims(tmp_path, "a") == claims(tmp_path, "b")
    assert claims(tmp_path, "a")[-1] == 4  # the one before it may be passed over
    assert "runs/tiny/checkpoints/step-00000004 is safe on two nodes" in log_of(tmp_path)
    assert "  safe: every file is on two nodes" in describe_path(place(tmp_path, "a", 4))
    left = "ab".replace(lost, "")
    shutil.rmtree(tmp_path / lost)
    shutil.copytree(tmp_path / left, tmp_path / "alone" / left)

    whole = replicated(stage, checkpoint=settings)
    pools(2).run(on, "ab", tmp_path, run_in_world, whole)
    assert "resumed from runs/tiny/checkpoints/step-00000004" in log_of(tmp_path)
    assert claims(tmp_path, "a") == claims(tmp_path, "b") == [4, 6]
    assert_equal(exported(run_on(tmp_path)), exported(run_on(tmp_path / "reference")))
    if stage < 3:  # there DeepSpeed's padding is whatever was in memory
        assert tensors(tmp_path) == tensors(tmp_path / "reference")

    alone = replicated(stage, data={"micro_batch_size": 8}, checkpoint=settings)
    pools(1).run(on, left, tmp_path / "alone", run_in_world, alone)
    assert claims(tmp_path / "alone", left) == []
    log = log_text(run_on(tmp_path / "alone", left))
    assert "resumed from runs/tiny/checkpoints/step-00000004" in log
    assert "there are none, as all ranks share a disk" in log


@pytest.mark.parametrize("host", ["a", pytest.param("b", marks=pytest.mark.slow)])
def test_what_is_damaged_on_one_node_comes_from_the_other(
    pools: Pools, tmp_path: Path, host: str
) -> None:
    """A copy, or what the rank wrote itself; then both are whole again."""
    pools(2).run(on, "ab", tmp_path, run_in_world, replicated(steps=4))
    flip_bit(place(tmp_path, host, 4) / "rank-00001.pt")
    pools(2).run(on, "ab", tmp_path, run_in_world, replicated(steps=5))
    assert "resumed from runs/tiny/checkpoints/step-00000004" in log_of(tmp_path)
    for each in "ab":
        assert 4 in claims(tmp_path, each)


PHASES = ["copy", "receive", "received", "safe"]


@pytest.mark.parametrize(
    ("phase", "rank"),
    [(phase, rank) for phase in PHASES for rank in (0, 1)],
)
@pytest.mark.slow
def test_a_kill_while_copying(pools: Pools, tmp_path: Path, phase: str, rank: int) -> None:
    """And then a node is lost: what claims to be safe has all its files on the other one."""
    pools(2).run(on, "ab", tmp_path, run_in_world, replicated(steps=4))
    with pytest.raises(RankError):
        pools(2).run(on, "ab", tmp_path, killed_while, phase, rank, replicated(steps=8))
    for host in "ab":
        assert 4 in claims(tmp_path, host)
    shutil.copytree(tmp_path / "a", tmp_path / "alone/a")
    alone = replicated(steps=8, data={"micro_batch_size": 8})
    pools(1).run(on, "a", tmp_path / "alone", run_in_world, alone)
    resumed = re.findall(r"resumed from .*/step-0*(\d+)", log_of(tmp_path / "alone"))
    assert int(resumed[-1]) >= max(claims(tmp_path, "a"))
    pools(2).run(on, "ab", tmp_path, run_in_world, replicated(steps=10))
    assert claims(tmp_path, "a")[-1] == claims(tmp_path, "b")[-1] == 10
    assert not list(tmp_path.glob("?/**/.*.tmp"))


def killed_while(phase: str, rank: int, config: Config) -> None:
    with fail_at(phase, rank=rank, kind="kill"):
        run_in_world(config)


def test_a_neighbour_without_room(two_ranks: RankPool, tmp_path: Path) -> None:
    """Training goes on, and the newest safe checkpoint stays."""
    settings = {"keep_last": 1}
    two_ranks.run(on, "ab", tmp_path, run_in_world, replicated(steps=2, checkpoint=settings))
    config = replicated(checkpoint=settings, trainer={"save_every": 1})
    two_ranks.run(on, "ab", tmp_path, with_a_full_disk, config)
    assert "b: [Errno 28] No space left on device (injected); trying again" in log_of(tmp_path)
    assert "not safe on two nodes: step-0000000" in log_of(tmp_path)
    for host in "ab":
        assert claims(tmp_path, host) == [2]
        assert place(tmp_path, host, 6).exists()
    two_ranks.run(on, "ab", tmp_path, run_in_world, config)  # although all its steps are taken
    assert claims(tmp_path, "a") == claims(tmp_path, "b") == [2, 6]
    two_ranks.run(on, "ab", tmp_path, run_in_world, replicated(steps=8, checkpoint=settings))
    assert claims(tmp_path, "a") == claims(tmp_path, "b")
    assert claims(tmp_path, "a")[-1] == 8
    assert not place(tmp_path, "a", 2).exists()


def with_a_full_disk(config: Config) -> None:
    with pytest.MonkeyPatch.context() as patch, fail_at("receive", rank=1, kind="full disk"):
        patch.setattr(copies, "FIRST_PAUSE_S", 0.01)
        patch.setattr(copies, "GIVE_UP_AFTER_S", 0.2)
        run_in_world(config)


FILE = "rank-00000.pt"


def test_what_a_receiver_refuses(tmp_path: Path) -> None:
    """Another save, a file that is no part of it, damaged bytes, a sender without the token."""
    ours, theirs = (tmp_path / host / "step-00000001" for host in "ab")
    ours.mkdir(parents=True)
    theirs.mkdir(parents=True)
    entry = write_file({"a": [1, 2, 3]}, ours / "rank-00000.pt")
    manifest = manifest_of(1, {"rank-00000.pt": entry})
    manifest.write(theirs)
    receiver = Receiver(tmp_path / "b", own_address({}), "secret")

    def copy(manifest: Manifest = manifest, file: str = FILE, token: str = "secret") -> str:
        try:
            send(ours, file, manifest, receiver.address, token, lambda: False)
        except (CheckpointError, OSError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    another = {"x.pt": write_file({"a": 0}, ours / "x.pt")}
    assert "the connection has ended" in copy(token="guessed")
    assert "rank-00000.pt is not of the same save" in copy(replace(manifest, saved_at=2.0))
    assert "x.pt is not of the same save" in copy(replace(manifest, files=another), "x.pt")
    whole = (ours / "rank-00000.pt").read_bytes()
    (ours / "rank-00000.pt").write_bytes(whole[:-1])
    assert "OSError: " in (text := copy())
    assert f"damaged: {len(whole) - 1} bytes, expected {len(whole)}" in text
    flip_bit(ours / "rank-00000.pt", whole.index(b"PK\x01\x02") + 16)  # its CRC
    (ours / "rank-00000.pt").write_bytes((ours / "rank-00000.pt").read_bytes() + whole[-1:])
    assert "OSError: " in (text := copy()) and "is not the file that was saved" in text
    assert [path.name for path in theirs.iterdir()] == ["manifest.json"]
    (ours / "rank-00000.pt").write_bytes(whole)
    assert copy() == ""
    verify_file(theirs / "rank-00000.pt", entry)
    receiver.close()
    assert "Connection refused" in copy()


@pytest.mark.parametrize(
    ("disks", "racks", "to"),
    [
        ("aabb", "    ", "bbaa"),
        ("abc", "   ", "bca"),
        ("abcd", "xxyy", "cdab"),
        ("abcd", "xyxy", "badc"),
        ("abc", "xxy", "cab"),
    ],
)
def test_who_sends_to_whom(disks: str, racks: str, to: str) -> None:
    """Each disk gets the files of one other, of another rack where that is possible for all."""
    found = neighbours_of([disks.index(disk) for disk in disks], racks)
    assert "".join(disks[rank] for rank in found) == to
    assert len(set(found)) == len(disks)


@pytest.mark.slow
def test_a_node_that_comes_back_with_an_old_save_of_the_same_step(
    pools: Pools, tmp_path: Path
) -> None:
    """Meanwhile another one was in its place, and the run saved step 4 again."""
    pools(2).run(on, "ab", tmp_path, run_in_world, replicated(steps=4))
    (tmp_path / "b").rename(tmp_path / "away")
    pools(2).run(on, "ab", tmp_path, run_in_world, replicated(steps=4, resume="2"))
    shutil.rmtree(tmp_path / "b")
    (tmp_path / "away").rename(tmp_path / "b")
    assert claims(tmp_path, "a")[-1] == claims(tmp_path, "b")[-1] == 4
    pools(2).run(on, "ab", tmp_path, run_in_world, replicated())
    assert "resumed from" in log_of(tmp_path)
    assert re.findall(r"resumed from .*/step-0*(\d+)", log_of(tmp_path))[-1] == "4"


def mark_on_one(parent: Path, number: int) -> bool:
    """The run was killed while it marked a checkpoint. Whether this disk then has the mark."""
    disks = Disks((0, 1))
    (directory,) = checkpoints_in(parent)
    if distributed.global_rank() == number:
        unmark_safe(directory)
    renew_marks(parent, disks)
    return is_safe(directory, read_manifest(directory))


def test_all_disks_mark_a_checkpoint_or_none(pools: Pools, tmp_path: Path) -> None:
    pools(2).run(on, "ab", tmp_path, run_in_world, replicated(steps=1))
    for number in (0, 1):
        assert pools(2).run(on, "ab", tmp_path, mark_on_one, CHECKPOINTS, number) == [True, True]


CHECKPOINTS = Path("runs/tiny/checkpoints")


def return_to_the_second(config: Config) -> None:
    """Step 5 is not finite, and step 4 does not count as good."""
    good = recovery.last_good

    def last_good(parent: Path, disks: Disks, before: int, passed_over: Dropped) -> Path | None:
        return good(parent, disks, min(before, 4), passed_over)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(NonFiniteError):
        patch.setattr(recovery, "last_good", last_good)
        with fail_at("forward", step=5, kind="nan"):
            copied_at_once(config)


@pytest.mark.slow
def test_what_a_rollback_returns_to_becomes_safe(pools: Pools, tmp_path: Path) -> None:
    """It was passed over for a newer one, which is removed."""
    pools(2).run(on, "ab", tmp_path, run_in_world, replicated(steps=4))
    for number, host in enumerate("ba"):
        (place(tmp_path, host, 2) / "safe.json").unlink(missing_ok=True)
        (place(tmp_path, host, 2) / f"rank-0000{number}.pt").unlink(missing_ok=True)
    health = {"nonfinite": "rollback", "max_rollbacks": 1}
    pools(2).run(on, "ab", tmp_path, return_to_the_second, replicated(health=health))
    assert "returning to runs/tiny/checkpoints/step-00000002" in log_of(tmp_path)
    for host in "ab":
        assert 2 in claims(tmp_path, host)
