"""Checkpoints in a store: a run goes on from there where its disks are lost, and a store that fails
delays nothing. A node is a rank with its own disk, as in test_disks."""

import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.checkpoint import copies, remote_store
from harness.checkpoint.copies import Copies
from harness.checkpoint.files import verify_file
from harness.checkpoint.manifest import Manifest, parse_manifest, read_manifest
from harness.checkpoint.remote_store import Store, remote_name
from harness.checkpoint.uploads import Uploads
from harness.checkpoint.written import write_file
from harness.config import Config
from harness.config.sections import CheckpointConfig
from harness.convert.dropped_saves import Dropped, Span
from harness.errors import CheckpointError, UnreadableCheckpoint
from harness.run import run_in_world
from harness.testing.faults import fail_at
from harness.testing.pool import RankError, RankPool
from tests.checkpoint.test_disks import config_of, files, log_of, on, place, run_on, tensors
from tests.checkpoint.test_remote_store import manifest_of
from tests.support.helpers import (
    Pools,
    assert_equal,
    checkpoint,
    error_of,
    exported,
    flip_bit,
    log_text,
    tiny_config,
)

FILES = {"rank-00000.pt", "rank-00001.pt"}


def remote_config(root: Path, stage: int = 2, **overrides: Any) -> Config:
    settings = {"remote": f"file://{root}/store"} | overrides.pop("checkpoint", {})
    return config_of(stage, checkpoint=settings, **overrides)


def stored(root: Path) -> dict[int, Path]:
    """The complete checkpoints in the store by step, all of their files verified."""
    found = {}
    for name, manifest in Store(f"file://{root}/store/tiny").checkpoints().items():
        directory = root / "store/tiny" / name
        for file, entry in manifest.files.items():
            verify_file(directory / file, entry)
        assert manifest.files.keys() >= FILES
        found[manifest.step] = directory
    return found


@pytest.mark.parametrize(
    ("stage", "background"),
    [(2, True), *(pytest.param(n, n == 1, marks=pytest.mark.slow) for n in (0, 1, 3))],
)
def test_a_lost_node_comes_back_from_the_store(
    two_ranks: RankPool, tmp_path: Path, stage: int, background: bool
) -> None:
    """The run on both goes on to the bit as one that was not interrupted."""
    two_ranks.run(on, "ab", tmp_path / "reference", run_in_world, config_of(stage))
    table = {"checkpoint": {"background": background}}
    half, whole = (remote_config(tmp_path, stage, run={"steps": n}, **table) for n in (4, 6))
    two_ranks.run(on, "ab", tmp_path, run_in_world, half)
    assert 4 in stored(tmp_path)
    own = files(tmp_path, "a", 4)
    with (place(tmp_path, "a", 4) / "rank-00000.pt").open("r+b") as file:
        file.truncate(100)  # and the other node has lost power
    (tmp_path / "b").rename(tmp_path / "lost")
    two_ranks.run(on, "ab", tmp_path, run_in_world, whole)
    assert "downloading" in log_of(tmp_path)
    assert "resumed from runs/tiny/checkpoints/step-00000004" in log_of(tmp_path)
    assert_equal(exported(run_on(tmp_path)), exported(run_on(tmp_path / "reference")))
    if stage < 3:  # there DeepSpeed's padding is whatever was in memory
        assert tensors(tmp_path) == tensors(tmp_path / "reference")
    assert files(tmp_path, "a", 4) == own
    assert files(tmp_path, "b", 4) & own <= {"net/mp_rank_00_model_states.pt"}
    assert 6 in stored(tmp_path)
    assert not list((tmp_path / "b").rglob("*.tmp"))


def test_all_disks_are_lost(pools: Pools, tmp_path: Path) -> None:
    """On as many ranks to the bit, and on one rank; and another run starts from there."""
    pools(2).run(on, "ab", tmp_path / "reference", run_in_world, config_of())
    for steps in (4, 6):
        config = remote_config(tmp_path, run={"steps": steps})
        pools(2).run(on, "ab", tmp_path, run_in_world, config)
        if steps == 6:
            assert tensors(tmp_path) == tensors(tmp_path / "reference")
        for host in "ab":
            shutil.rmtree(tmp_path / host)
    url, other = f"file://{tmp_path}/store/tiny", {"name": "other", "steps": 7}
    for step, wanted in {6: url, 4: f"{url}/{stored(tmp_path)[4].name}"}.items():
        task = {"args": {"dropout": 0.2}}
        config = tiny_config(tmp_path, 2, run=other | {"resume": wanted}, task=task)
        pools(1).run(run_in_world, config)
        assert f"resumed from {config.run_dir}/checkpoints/step-{step:08d}" in log_text(config)
        shutil.rmtree(config.run_dir)
    config = tiny_config(tmp_path, 2, run=other | {"resume": f"{url}/step-00000001.1"})
    message = pools(1).run(error_of, config)[0]
    assert "expected a checkpoint, or a run's; found there: step-00000006" in message


def test_retention_is_the_same_there(two_ranks: RankPool, tmp_path: Path) -> None:
    config = remote_config(tmp_path, checkpoint={"keep_last": 1}, trainer={"save_every": 1})
    two_ranks.run(on, "aa", tmp_path, run_in_world, config)
    assert sorted(stored(tmp_path)) == [6]
    assert len(list((tmp_path / "store/tiny").iterdir())) == 2  # and `best`


def test_what_is_damaged_on_the_disk_comes_from_the_store(pools: Pools, tmp_path: Path) -> None:
    remote = {"remote": f"file://{tmp_path}/store"}
    config = tiny_config(tmp_path, 1, checkpoint=remote, trainer={"save_every": 2})
    pools(1).run(run_in_world, config)
    file = checkpoint(config, 6) / "rank-00000.pt"
    before = file.read_bytes()
    flip_bit(file)
    pools(1).run(run_in_world, config)
    assert "rank-00000.pt: damaged" in log_text(config)
    assert f"resumed from {file.parent}" in log_text(config)
    assert file.read_bytes() == before


def test_what_is_damaged_is_looked_for_in_the_store(pools: Pools, tmp_path: Path) -> None:
    """Although it is newer than what the store has, which is damaged on the disk as well."""
    config = tiny_config(tmp_path, 1, trainer={"save_every": 2})
    pools(1).run(run_in_world, config)
    old = checkpoint(config, 4)
    shutil.copytree(old, tmp_path / "store/tiny" / remote_name(old, read_manifest(old)))
    for step in (4, 6):
        flip_bit(checkpoint(config, step) / "rank-00000.pt")
    remote = {"remote": f"file://{tmp_path}/store"}
    pools(1).run(run_in_world, tiny_config(tmp_path, 1, checkpoint=remote))
    assert f"resumed from {old}" in log_text(config)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('"metrics": {}', '"metrics": {"eval/auc": NaN}', ""),
        ('"finite": true', '"finite": false', "none of its checkpoints has finite weights"),
    ],
)
def test_what_the_store_has_is_not_started_over(
    pools: Pools, tmp_path: Path, old: str, new: str, expected: str
) -> None:
    """After the loss of the disk: also where no checkpoint is a good one."""
    remote = {"remote": f"file://{tmp_path}/store"}
    config = tiny_config(tmp_path, 1, checkpoint=remote, run={"steps": 2})
    pools(1).run(run_in_world, config)
    (manifest,) = (tmp_path / "store/tiny").glob("step-*/manifest.json")
    text = re.sub(r'"metrics": {[^}]*}', '"metrics": {}', manifest.read_text())
    assert old in text
    manifest.write_text(text.replace(old, new))
    shutil.rmtree(config.run_dir)
    assert expected in (error := pools(1).run(error_of, config)[0])
    assert error or f"resumed from {checkpoint(config, 2)}" in log_text(config)


class Broken:
    """A store that fails a number of times, and counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int):
        self.left, upload = times, Store.upload

        def fail(store: Store, *args: Any) -> None:
            if self.left > 0:
                self.left -= 1
                raise CheckpointError("the store is down")
            upload(store, *args)

        monkeypatch.setattr(Store, "upload", fail)
        monkeypatch.setattr(copies, "FIRST_PAUSE_S", 0.01)


def train_on_a_broken_store(config: Config, times: int, give_up_after_s: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        Broken(patch, times)
        patch.setattr(copies, "GIVE_UP_AFTER_S", give_up_after_s)
        patch.setattr(copies, "WORD_AFTER_S", give_up_after_s / 4)
        run_in_world(config)


def test_a_store_that_fails_is_tried_again(two_ranks: RankPool, tmp_path: Path) -> None:
    config = remote_config(tmp_path)
    two_ranks.run(on, "aa", tmp_path, train_on_a_broken_store, config, 7, 60.0)
    assert 6 in stored(tmp_path)
    assert log_of(tmp_path).count("the store is down; trying again; training goes on") <= 2
    for step in (2, 4):  # passed over, or uploaded: but on the disk
        assert place(tmp_path, "a", step).exists()


def test_a_store_that_is_down_delays_only_the_end(two_ranks: RankPool, tmp_path: Path) -> None:
    config = remote_config(tmp_path, checkpoint={"keep_last": 1})
    two_ranks.run(on, "aa", tmp_path, train_on_a_broken_store, config, 10**9, 0.2)
    assert stored(tmp_path) == {}
    assert "step-00000006: the next start goes on with the newest" in log_of(tmp_path)
    for rank in (0, 1):
        word = rf"rank {rank} WARNING the end of the run has waited for .* is not uploaded yet"
        assert re.search(word, log_of(tmp_path))
    two_ranks.run(on, "aa", tmp_path, run_in_world, config)  # although all its steps are taken
    assert 6 in stored(tmp_path)


def list_fails(config: Config) -> str:
    with pytest.MonkeyPatch.context() as patch:

        def fail(*_: Any, **__: Any) -> None:
            raise CheckpointError("the store is down")

        patch.setattr(Store, "checkpoints", fail)
        patch.setattr(copies, "GIVE_UP_AFTER_S", 0.0)
        return error_of(config)


def test_a_run_does_not_start_over_without_knowing(two_ranks: RankPool, tmp_path: Path) -> None:
    config = remote_config(tmp_path)
    errors = two_ranks.run(on, "aa", tmp_path, list_fails, config)
    assert "the store is down: whether this run has checkpoints there is not known" in errors[1]
    anew = remote_config(tmp_path, run={"resume": "none", "steps": 2})
    assert two_ranks.run(on, "aa", tmp_path, list_fails, anew) == ["", ""]
    assert two_ranks.run(on, "aa", tmp_path, list_fails, config) == ["", ""]
    assert "the store is down: resuming without it" in log_of(tmp_path)


def killed_while(phase: str, rank: int, config: Config) -> None:
    with fail_at(phase, rank=rank, kind="kill"):
        run_in_world(config)


@pytest.mark.parametrize(
    ("phase", "rank"),
    [
        ("upload", 1),
        *(
            pytest.param(phase, rank, marks=pytest.mark.slow)
            for phase, rank in [("part", 0), ("part", 1), ("uploaded", 0), ("forget", 0)]
        ),
    ],
)
def test_a_kill_while_uploading(pools: Pools, tmp_path: Path, phase: str, rank: int) -> None:
    """What has a manifest in the store is complete, and the next start uploads what is not."""
    config = remote_config(tmp_path, checkpoint={"keep_last": 1})
    with pytest.raises(RankError):
        pools(2).run(on, "ab", tmp_path, killed_while, phase, rank, config)
    assert bool(stored(tmp_path)) == (phase == "forget")
    pools(2).run(on, "ab", tmp_path, run_in_world, config)
    assert list(stored(tmp_path)) == [6]
    assert len(list((tmp_path / "store/tiny").iterdir())) == 2  # and `best`


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["download", "part"])
def test_a_kill_while_downloading(pools: Pools, tmp_path: Path, phase: str) -> None:
    half, whole = (remote_config(tmp_path, run={"steps": steps}) for steps in (4, 6))
    pools(2).run(on, "ab", tmp_path, run_in_world, half)
    (tmp_path / "b").rename(tmp_path / "lost")
    with pytest.raises(RankError):
        pools(2).run(on, "ab", tmp_path, killed_while, phase, 1, whole)
    pools(2).run(on, "ab", tmp_path, run_in_world, whole)
    assert "resumed from runs/tiny/checkpoints/step-00000004" in log_of(tmp_path)
    assert 6 in stored(tmp_path)
    assert not list((tmp_path / "b").rglob("*.tmp"))


def return_to_the_first(root: Path) -> list[str]:
    store = Store(f"file://{root}/store")
    unknown = root / "store/step-00000009.9000/manifest.json"  # of a later version of harness
    unknown.parent.mkdir(parents=True)
    unknown.write_text('{"format": 99}')
    ours = Copies(Uploads(store, CheckpointConfig))
    for step in range(1, 4):
        directory = root / f"step-{step:08d}"
        directory.mkdir()
        entry = write_file({"step": step}, directory / "rank-00000.pt")
        manifest = manifest_of(step, {"rank-00000.pt": entry}, pinned="a" if step == 3 else None)
        ours.add(directory, manifest)
        ours.finish(lambda: False)
    assert [manifest.step for manifest in store.checkpoints().values()] == [3, 2, 1]
    ours.add(root / "step-00000004", manifest_of(4, {}))
    ours.forget(Dropped(frozenset({Span(1.0, 4.0)})))
    ours.finish(lambda: False)
    ours.close()
    with pytest.raises(UnreadableCheckpoint):
        store.checkpoints(all_readable=True)
    assert unknown.exists()
    return list(store.checkpoints())


def test_a_rollback_removes_what_was_after_it(pools: Pools, tmp_path: Path) -> None:
    assert pools(1).run(return_to_the_first, tmp_path) == [
        ["step-00000003.3000", "step-00000001.1000"]
    ]


def upload_thrice(root: Path) -> list[str]:
    """The checkpoints whose manifests were read."""
    found: list[str] = []

    def parse(text: bytes, directory: str) -> Manifest:
        found.append(directory.rpartition("/")[2])
        return parse_manifest(text, directory)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote_store, "parse_manifest", parse)
        ours = Copies(Uploads(Store(f"file://{root}/store"), CheckpointConfig))
        for step in range(1, 4):
            ours.add(root / f"step-{step:08d}", manifest_of(step, {}))
            ours.finish(lambda: False)
        ours.close()
    return found


def copy_again(root: Path) -> list[str]:
    """A rollback returns to what is being copied, and then to what waits. What is copied."""
    ours = Copies(Uploads(Store(f"file://{root}/store"), CheckpointConfig))
    for step in (1, 2, 1, 2):
        directory = root / f"step-{step:08d}"
        directory.mkdir(exist_ok=True)
        manifest_of(step, {}).write(directory)
        ours.add_existing(directory)
        if not ours._current:
            ours.poll()
    ours.close()
    return [copy.directory.name for copy in ours._copies]


def test_nothing_is_copied_twice(pools: Pools, tmp_path: Path) -> None:
    assert pools(1).run(copy_again, tmp_path) == [["step-00000001", "step-00000002"]]


def test_no_manifest_is_read_twice(pools: Pools, tmp_path: Path) -> None:
    expected = [f"step-0000000{step}.{step}000" for step in range(1, 4)]
    assert pools(1).run(upload_thrice, tmp_path) == [expected]


def end_while_removing(root: Path, is_aborted: bool, give_up_after_s: float) -> float:
    """The seconds that the end of a run takes, if the store is down since a rollback."""

    def down(*_: Any, **__: Any) -> None:
        raise CheckpointError("the store is down")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "checkpoints", down)
        patch.setattr(copies, "GIVE_UP_AFTER_S", give_up_after_s)
        ours = Copies(Uploads(Store(f"file://{root}/store"), CheckpointConfig))
        ours.forget(Dropped(frozenset({Span(1.0, 4.0)})))
        began = time.monotonic()
        ours.finish(lambda: is_aborted)
        took = time.monotonic() - began
        ours.close()
    return took


def test_a_signal_ends_the_wait_for_a_removal(pools: Pools, tmp_path: Path) -> None:
    for is_aborted, give_up_after_s in ((True, 5.0), (False, 0.1)):
        (took,) = pools(1).run(end_while_removing, tmp_path, is_aborted, give_up_after_s)
        assert took < 2.0


def save_twice(root: Path) -> list[float]:
    """The second save of a step replaces the first, while that is uploaded."""
    store = Store(f"file://{root}/store")
    ours = Copies(Uploads(store, CheckpointConfig))
    directory = root / "step-00000001"
    directory.mkdir()
    for saved_at in (1.0, 2.0):
        entry = write_file({"saved_at": saved_at}, directory / "rank-00000.pt")
        manifest = replace(manifest_of(1, {"rank-00000.pt": entry}), saved_at=saved_at)
        ours.add(directory, manifest)
        if saved_at == 1.0:
            ours.poll()
    ours.finish(lambda: False)
    ours.close()
    for name, manifest in store.checkpoints().items():
        verify_file(root / "store" / name / "rank-00000.pt", manifest.files["rank-00000.pt"])
    return [manifest.saved_at for manifest in store.checkpoints().values()]


def test_a_step_that_is_saved_again_is_not_mixed_with_the_first(
    pools: Pools, tmp_path: Path
) -> None:
    assert pools(1).run(save_twice, tmp_path) == [[2.0]]


def test_what_a_download_replaces_stays_if_it_is_damaged(pools: Pools, tmp_path: Path) -> None:
    """The user asks for another save of a step that is on the disk."""
    remote = {"remote": f"file://{tmp_path}/store"}
    config = tiny_config(tmp_path, 1, checkpoint=remote, run={"steps": 2})
    pools(1).run(run_in_world, config)
    (stored,) = (tmp_path / "store/tiny").glob("step-*")
    shutil.rmtree(config.run_dir)
    local = tiny_config(tmp_path, 1, run={"steps": 2})
    pools(1).run(run_in_world, local)
    before = read_manifest(checkpoint(local, 2))
    flip_bit(stored / "rank-00000.pt")
    asked = tiny_config(tmp_path, 1, run={"steps": 3, "resume": f"file://{stored}"})
    assert "damaged" in pools(1).run(error_of, asked)[0]
    assert read_manifest(checkpoint(local, 2)) == before
