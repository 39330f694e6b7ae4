"""What a rollback has dropped stays dropped, wherever it was and whenever the run is killed."""

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from harness import distributed, recovery
from harness.checkpoint.disks import Disks
from harness.checkpoint.dropped import drop_after, keep, read_dropped
from harness.checkpoint.inspect import describe_path
from harness.checkpoint.manifest import read_manifest
from harness.checkpoint.remote_store import Store, remote_name
from harness.checkpoint.save import Saver
from harness.config import Config
from harness.convert.convert import Options, convert
from harness.convert.dropped_saves import Dropped, Span
from harness.convert.run_checkpoints import linked_in
from harness.errors import CheckpointError, NonFiniteError
from harness.files import json_write
from harness.run import run_in_world
from harness.testing.faults import die, fail_at
from harness.testing.pool import RankError
from tests.checkpoint.test_disks import config_of, log_of, on, place
from tests.checkpoint.test_memory import kept, run_pool
from tests.checkpoint.test_remote_store import manifest_of
from tests.support.helpers import Pools, checkpoint, error_of, log_text, tiny_config

LAST_GOOD = recovery.last_good


def train_and_die(config: Config, phase: str, rank: int) -> None:
    """Step 5 is not finite: the run returns to step 2, as if step 4 were not good. It is killed in
    a phase of that, or in the forward of the step after. The store is down since then."""
    returned = False

    def last_good(parent: Path, disks: Any, before: int, left: Dropped) -> Path | None:
        nonlocal returned
        if before < 5:  # at the start
            return LAST_GOOD(parent, disks, before, left)
        returned = True
        patch.setattr(Store, "remove", down)
        return LAST_GOOD(parent, disks, before - 2, left)

    def down(*_: Any) -> None:
        raise CheckpointError("the store is down")

    commit = Saver._commit

    def commit_and_copy(saver: Saver, pending: Any) -> None:
        commit(saver, pending)
        for copies in saver._copies:
            copies.finish(lambda: False)

    def die_after_returning() -> None:
        if returned:
            die()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recovery, "last_good", last_good)
        patch.setattr(Saver, "_commit", commit_and_copy)
        with (
            fail_at("forward", step=5, kind="nan"),
            fail_at(phase, rank=rank, kind=die_after_returning),
        ):
            run_in_world(config)


@pytest.mark.parametrize(
    ("hosts", "phase", "rank", "settings"),
    [
        ("aa", "prune", 0, "remote in_memory_every"),
        *(
            pytest.param(hosts, phase, rank, settings, marks=pytest.mark.slow)
            for hosts, phase, rank, settings in [
                ("aa", "forward", 1, "remote"),
                ("ab", "prune", 1, "remote"),
                ("ab", "prune", 1, "replicas"),
                ("ab", "prune", 1, "in_memory_every"),
                ("ab", "forward", 1, "in_memory_every"),
            ]
        ),
    ],
)
def test_it_does_not_come_back(
    pools: Pools, tmp_path: Path, hosts: str, phase: str, rank: int, settings: str
) -> None:
    table = {"remote": f"file://{tmp_path}/store", "replicas": 1, "in_memory_every": 1}
    table = {key: table[key] for key in settings.split()}
    config = config_of(1, checkpoint=table, health={"nonfinite": "rollback"}, run={"steps": 6})
    with pytest.raises(RankError):
        run_pool(pools(2), hosts, tmp_path, train_and_die, config, phase, rank)
    assert "returning to runs/tiny/checkpoints/step-00000002" in log_of(tmp_path)
    old = {path.name for path in tmp_path.glob("store/tiny/step-*")}
    run_pool(pools(2), hosts, tmp_path, run_in_world, config)
    resumed = log_of(tmp_path).rpartition("resumed from ")[2]
    assert resumed.startswith("runs/tiny/checkpoints/step-00000002")
    assert kept(tmp_path) == []
    if "remote" in table:
        assert len(old) == 3
        left = {path.name for path in tmp_path.glob("store/tiny/step-*")}
        assert old - left == {max(old)}
        assert "step-00000006" in max(left)


def train_and_return(config: Config) -> None:
    """Step 5 is not finite, and not the second time either."""
    with fail_at("forward", step=5, kind="nan"), pytest.raises(NonFiniteError):
        run_in_world(config)


@pytest.mark.parametrize("place", ["step", pytest.param("store", marks=pytest.mark.slow)])
def test_what_the_user_asks_for_is_kept(pools: Pools, tmp_path: Path, place: str) -> None:
    """A rollback to step 2 was killed before it removed the steps 4 and 6: the user goes on from
    step 4, and a rollback returns to it. What is newer stays dropped, wherever it is."""
    config = tiny_config(tmp_path, 1, trainer={"save_every": 2}, run={"steps": 6})
    pools(1).run(run_in_world, config)
    saves = {step: checkpoint(config, step) for step in (2, 4, 6)}
    times = {step: read_manifest(path).saved_at for step, path in saves.items()}
    dropped = config.run_dir / "checkpoints/dropped.json"
    json_write([[times[2], times[6]]], dropped)
    wanted = "4"
    if place == "store":
        stored = tmp_path / "store" / remote_name(saves[4], read_manifest(saves[4]))
        shutil.move(saves[4], stored)
        wanted = f"file://{stored}"
    health = {"nonfinite": "rollback", "max_rollbacks": 1}
    began = time.time()
    again = tiny_config(tmp_path, 1, run={"resume": wanted, "steps": 5}, health=health)
    pools(1).run(train_and_return, again)
    assert log_text(config).count(f"resumed from {saves[4]}") == 2
    assert f"removed {saves[6]}: a rollback has dropped it" in log_text(config)
    assert read_manifest(saves[4]).saved_at == times[4]
    found = pools(1).run(read_dropped, dropped.parent, Disks((0,)))[0]
    assert not found.has(times[4])
    for unseen in (times[4] - 1e-3, times[6], began):  # in a memory, in a store that was down
        assert found.has(unseen)


def test_nothing_names_what_a_killed_rollback_has_removed(pools: Pools, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, 1, trainer={"save_every": 2}, run={"steps": 4})
    pools(1).run(run_in_world, config)
    old, new = checkpoint(config, 2), checkpoint(config, 4)
    assert linked_in(old.parent) == new
    times = [read_manifest(path).saved_at for path in (old, new)]
    json_write([times], old.parent / "dropped.json")
    saving = {"save_at_end": False}
    pools(1).run(run_in_world, tiny_config(tmp_path, 1, trainer=saving, run={"steps": 3}))
    assert not new.exists()
    assert (old.parent / "latest").read_text() == f"{old.name}\n"
    assert not (old.parent / "best").is_symlink() or linked_in(old.parent) == old


def copied_at_once(config: Config) -> None:
    """A run that waits for the copies of each save."""
    commit = Saver._commit

    def commit_and_copy(saver: Saver, pending: Any) -> None:
        commit(saver, pending)
        saver.finish_copies(lambda: False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saver, "_commit", commit_and_copy)
        run_in_world(config)


def return_once(config: Config) -> None:
    """Step 5 is not finite: one rollback, then the run ends."""
    with fail_at("forward", step=5, kind="nan"), pytest.raises(NonFiniteError):
        run_in_world(config)


def resumed(config: Config) -> list[Path]:
    """The checkpoints that the run has started from, or returned to."""
    return [Path(path) for path in re.findall(r"resumed from ([^\s,]*)", log_text(config))]


def returns(config: Config) -> list[int]:
    """The steps that the run has returned to."""
    return [int(step) for step in re.findall(r"returning to .*/step-(\d+)", log_text(config))]


ROLLBACK = {"nonfinite": "rollback", "max_rollbacks": 1}


def test_a_pinned_save_that_was_dropped_stays_and_is_passed_over(
    pools: Pools, tmp_path: Path
) -> None:
    """By a start, a later rollback and `harness convert`: only run.resume takes it, and then it is
    one like others."""
    events = [{"command": "save as it", "at": 4}]
    trainer = {"save_every": 2, "save_at_end": False}
    run = {"steps": 5}
    pools(1).run(run_in_world, tiny_config(tmp_path, 1, trainer=trainer, run=run, events=events))
    config = tiny_config(tmp_path, 1, trainer={"save_at_end": False}, run=run, health=ROLLBACK)
    old, new = checkpoint(config, 2), checkpoint(config, 4)
    pinned = new.with_name(f"{new.name}-it")
    json_write([[read_manifest(old).saved_at, time.time()]], old.parent / "dropped.json")
    lines: list[str] = []
    convert(config.run_dir, tmp_path / "x.sft", Options(), lines.append)
    assert lines[0] == f"note: passed over: {pinned}: a rollback has dropped it"
    assert lines[1] == f"note: from checkpoints/{old.name}/net"
    assert sum("dropped by a rollback" in line for line in describe_path(config.run_dir)) == 1
    pools(1).run(return_once, config)
    assert log_text(config).count(f"resumed from {old}\n") == 2
    assert returns(config) == [2]
    assert pinned.exists() and not new.exists()
    asked = tiny_config(tmp_path, 1, run=run | {"resume": "4"}, health=ROLLBACK)
    pools(1).run(return_once, asked)
    assert log_text(config).count(f"resumed from {pinned}") == 2
    assert returns(config) == [2, 4]


def test_a_rollback_does_not_return_to_what_run_resume_has_left(
    pools: Pools, tmp_path: Path
) -> None:
    """Steps 4 and 6 are of the run as it was before it was started from step 2 again. They stay,
    and a start takes them only if it is told to."""
    pools(1).run(run_in_world, tiny_config(tmp_path, 1, trainer={"save_every": 2}))
    settings = {"trainer": {"save_at_end": False}, "health": ROLLBACK}
    saving = {"trainer": {"save_every": 1}, "checkpoint": {"keep_last": 3}}
    config = tiny_config(tmp_path, 1, run={"resume": "2", "steps": 3}, **saving)
    pools(1).run(run_in_world, config)
    assert checkpoint(config, 2).exists()  # one of the last three
    shutil.rmtree(checkpoint(config, 3))
    config = tiny_config(tmp_path, 1, run={"resume": "2"}, **settings)
    pools(1).run(return_once, config)
    assert returns(config) == [2]
    shutil.rmtree(checkpoint(config, 5))  # as if it had been killed before it saved
    pools(1).run(run_in_world, tiny_config(tmp_path, 1, run={"steps": 3}, **settings))
    old = [checkpoint(config, step) for step in (2, 4, 6)]
    assert resumed(config)[-1] == old[0] and all(path.exists() for path in old)
    pools(1).run(run_in_world, tiny_config(tmp_path, 1, run={"resume": "4"}, **settings))
    pools(1).run(run_in_world, tiny_config(tmp_path, 1, **settings))
    assert resumed(config)[-2:] == [old[1], old[1]]


def test_a_rollback_of_a_run_that_goes_on_from_another(pools: Pools, tmp_path: Path) -> None:
    """It returns to where it began, and not to what it had saved before."""
    base = tiny_config(tmp_path / "base", 1, run={"steps": 4})
    config = tiny_config(tmp_path, 1, run={"steps": 2})
    for each in (base, config):
        pools(1).run(run_in_world, each)
    again = {"steps": 5, "resume": str(checkpoint(base, 4))}
    pools(1).run(return_once, tiny_config(tmp_path, 1, run=again, health=ROLLBACK))
    assert returns(config) == [4]
    assert checkpoint(config, 2).exists()


def test_the_newest_below_a_url_is_not_what_was_dropped(pools: Pools, tmp_path: Path) -> None:
    remote = {"remote": f"file://{tmp_path}/store"}
    config = tiny_config(tmp_path, 1, trainer={"save_every": 2}, checkpoint=remote)
    pools(1).run(copied_at_once, config)
    saves = [checkpoint(config, step) for step in (2, 4, 6)]
    times = [read_manifest(path).saved_at for path in saves]
    json_write([[times[0], times[2]]], saves[0].parent / "dropped.json")
    again = {"resume": f"file://{tmp_path}/store/tiny", "steps": 3}
    pools(1).run(run_in_world, tiny_config(tmp_path, 1, checkpoint=remote, run=again))
    assert f"resumed from {saves[0]}\n" in log_text(config)
    json_write([[0.0, time.time()]], saves[0].parent / "dropped.json")
    (error,) = pools(1).run(error_of, tiny_config(tmp_path, 1, checkpoint=remote, run=again))
    assert "none of its checkpoints has finite weights, or rollbacks have dropped them" in error


def test_the_own_checkpoint_is_not_left(pools: Pools, tmp_path: Path) -> None:
    """Where run.resume has its absolute path, and the run a relative one."""
    pools(1).run(on, "a", tmp_path, run_in_world, config_of(1, run={"steps": 2}))
    before = read_manifest(place(tmp_path, "a", 2))
    asked = {"resume": str(place(tmp_path, "a", 2))}
    config = config_of(1, run=asked, health=ROLLBACK, trainer={"save_every": 9})
    pools(1).run(on, "a", tmp_path, return_once, config)
    assert "returning to runs/tiny/checkpoints/step-00000002" in log_of(tmp_path)
    assert read_manifest(place(tmp_path, "a", 2)) == before  # not saved again


def keep_and_read(parent: Path, number: int) -> list[bool]:
    """The second disk was away when a dropped save was kept."""
    disks = Disks((0, 1))
    kept, other = (manifest_of(step, {}) for step in (4, 3))
    dropped = drop_after(parent, manifest_of(2, {}), 6.0, None, disks)
    before = (parent / "dropped.json").read_bytes()
    found = [dropped.has(kept.saved_at), dropped.has(other.saved_at)]
    keep(kept, parent, dropped, disks)
    if distributed.global_rank() == number:
        (parent / "dropped.json").write_bytes(before)
    dropped = read_dropped(parent, disks)
    return [*found, dropped.has(kept.saved_at), dropped.has(other.saved_at)]


@pytest.mark.parametrize("number", [0, 1])
def test_a_disk_that_was_away_drops_nothing_again(
    pools: Pools, tmp_path: Path, number: int
) -> None:
    found = pools(2).run(on, "ab", tmp_path, keep_and_read, Path(), number)
    assert found == [[True, True, False, True]] * 2


def keep_on_a_fresh_disk(parent: Path) -> str:
    disks = Disks((0, 1))
    if distributed.global_rank() == 0:
        parent.mkdir()
        json_write([[2.0, 6.0]], parent / "dropped.json")
    keep(manifest_of(4, {}), parent, read_dropped(parent, disks), disks)
    return (parent / "dropped.json").read_text()


def test_a_fresh_disk_gets_what_is_written_down(pools: Pools, tmp_path: Path) -> None:
    one, other = pools(2).run(on, "ab", tmp_path, keep_on_a_fresh_disk, Path("new"))
    assert one == other
    assert json.loads(one) == {"spans": [[2.0, 6.0]], "left": [], "kept": [[4.0, 6.0]]}


def test_a_start_writes_down_what_a_disk_lacks(pools: Pools, tmp_path: Path) -> None:
    pools(2).run(on, "ab", tmp_path, run_in_world, config_of(1, run={"steps": 1}))
    json_write([[1.0, 2.0]], place(tmp_path, "a", 1).with_name("dropped.json"))
    pools(2).run(on, "ab", tmp_path, run_in_world, config_of(1, run={"steps": 1}))
    text = place(tmp_path, "b", 1).with_name("dropped.json").read_text()
    assert json.loads(text)["spans"] == [[1.0, 2.0]]


def test_the_store_keeps_what_the_disk_keeps(pools: Pools, tmp_path: Path) -> None:
    """Steps 4 and 6 are left, and do not count."""
    remote = {"remote": f"file://{tmp_path}/store"}
    config = tiny_config(tmp_path, 1, trainer={"save_every": 2}, checkpoint=remote)
    pools(1).run(copied_at_once, config)
    keeping = {"checkpoint": remote | {"keep_last": 2}, "run": {"resume": "2", "steps": 3}}
    pools(1).run(copied_at_once, tiny_config(tmp_path, 1, **keeping))
    for parent in (tmp_path / "store/tiny", config.run_dir / "checkpoints"):
        names = {path.name.partition(".")[0] for path in parent.glob("step-*")}
        assert names == {"step-00000002", "step-00000003", "step-00000006"}


def drop_below_what_was_kept(parent: Path) -> list[tuple[bool, bool]]:
    """A start from what was dropped, at 10, leaves what is newer; a rollback returns to 5."""
    disks, kept = Disks((0,)), manifest_of(10, {})
    dropped = drop_after(parent, manifest_of(5, {}), 15.0, None, disks)
    keep(kept, parent, dropped, disks)
    drop_after(parent, manifest_of(5, {}), 20.0, Span(10.0, 16.0), disks)
    dropped = read_dropped(parent, disks)
    saves = [manifest_of(at, {}) for at in (5, 10, 12, 16, 18)]
    return [
        (dropped.has(save.saved_at), dropped.removes(save.saved_at, save.pinned)) for save in saves
    ]


def test_what_was_kept_is_dropped_again(pools: Pools, tmp_path: Path) -> None:
    """Of what was left, what had been dropped before goes."""
    (found,) = pools(1).run(drop_below_what_was_kept, tmp_path)
    goes, stays = (True, True), (True, False)
    assert found == [(False, False), goes, goes, stays, goes]


def test_what_was_kept_is_left_again(pools: Pools, tmp_path: Path) -> None:
    """Step 4 was dropped and kept; then the user goes on from step 2."""
    trainer = {"save_every": 2, "save_at_end": False}
    pools(1).run(run_in_world, tiny_config(tmp_path, 1, trainer=trainer, run={"steps": 5}))
    config = tiny_config(tmp_path, 1, run={"resume": "2"}, health=ROLLBACK)
    times = [read_manifest(checkpoint(config, step)).saved_at for step in (2, 4)]
    facts = {"spans": [times], "left": [], "kept": [[times[1], times[1]]]}
    json_write(facts, checkpoint(config, 2).parent / "dropped.json")
    pools(1).run(return_once, config)
    assert returns(config) == [2]
    assert checkpoint(config, 4).exists()
