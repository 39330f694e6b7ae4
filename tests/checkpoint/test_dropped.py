"""What a rollback has dropped stays dropped, wherever it was and whenever the run is killed."""

from pathlib import Path
from typing import Any

import pytest

from harness import recovery
from harness.checkpoint.remote_store import Store
from harness.checkpoint.save import Saver
from harness.config import Config
from harness.errors import CheckpointError
from harness.run import run_in_world
from harness.testing.faults import die, fail_at
from harness.testing.pool import RankError
from tests.checkpoint.test_disks import config_of, log_of
from tests.checkpoint.test_memory import kept, run_pool
from tests.support.helpers import Pools

LAST_GOOD = recovery.last_good


def train_and_die(config: Config, phase: str, rank: int) -> None:
    """Step 5 is not finite: the run returns to step 2, as if step 4 were not good. It is killed in
    a phase of that, or in the forward of the step after. The store is down since then."""
    returned = False

    def last_good(parent: Path, disks: Any, before: int) -> Path | None:
        nonlocal returned
        if before < 5:  # at the start
            return LAST_GOOD(parent, disks, before)
        returned = True
        patch.setattr(Store, "remove", down)
        return LAST_GOOD(parent, disks, before - 2)

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
