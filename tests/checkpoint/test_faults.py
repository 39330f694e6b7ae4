"""Killed and failing saves: runs resume from a complete checkpoint, to the same weights."""

import random
import subprocess
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from harness.checkpoint.manifest import read_manifest
from harness.config import Config
from harness.convert.run_checkpoints import checkpoints_in
from harness.io import load
from harness.run import run_in_world
from harness.testing.faults import die_during_save, fail_at, io_error
from harness.testing.pool import RankError, RankPool
from tests.support.helpers import (
    assert_equal,
    checkpoint,
    error_of,
    exports,
    flip_bit,
    log_text,
    losses,
    small_disk,
    tiny_config,
)
from tests.support.quick import quick

WIDE = {"args": {"width": 2100}}
"""17.7 MB of weights: with AdamW's moments a checkpoint of about 71 MB."""


def two_engines(directory: Path, **overrides: Any) -> Config:
    first = tiny_config(directory).engines["net"].model_dump()
    other = first | {"ds_overrides": {"zero_optimization": {"stage": 2}}}
    trainer = {"trainer": {"save_every": 2, "export_every": 0}}
    return tiny_config(directory, 3, engines={"other": other}, **trainer, **overrides)


def train_with(config: Config, faults: list[tuple[str, dict[str, Any]]]) -> None:
    """Trains on this rank with faults of `fail_at` (or `during`, of `die_during_save`)."""
    with ExitStack() as stack:
        for phase, details in faults:
            make = die_during_save if phase == "during" else fail_at
            arguments = () if phase == "during" else (phase,)
            stack.enter_context(make(*arguments, **details))  # type: ignore[operator]
        run_in_world(config)


def final_weights(config: Config) -> dict[str, Tensor]:
    """All exported weights of the last step, by engine and name."""
    files = sorted(exports(config).iterdir())
    return {f"{file.stem}.{name}": weight for file in files for name, weight in load(file).items()}


@pytest.fixture(scope="module")
def uninterrupted(two_ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """An uninterrupted run of two engines."""
    config = two_engines(tmp_path_factory.mktemp("uninterrupted"))
    two_ranks.run(run_in_world, config)
    return config


PHASES = [
    ("room", {}),
    ("file", {"path": "rank-"}),
    ("file", {"path": "net/"}),
    ("file", {"path": "other/"}),
    ("manifest", {}),
    ("rename", {}),
    ("latest", {}),
    ("prune", {}),
    ("pruning", {"path": ".pruned"}),
]
QUICK = {
    ("room", None, None),
    ("file", "rank-", 1),
    ("file", "net/", None),
    ("file", "other/", 0),
    ("manifest", None, None),
    ("rename", None, 0),
    ("latest", None, None),
    ("prune", None, None),
    ("pruning", ".pruned", None),
}
"""Every phase once; one rank in some where both write, and in one phase of rank 0 alone."""
KILLED = [
    pytest.param(
        phase,
        details,
        rank,
        id=f"{phase} {details.get('path', '')}".strip()
        + ("-all" if rank is None else f"-rank{rank}"),
        marks=[] if (phase, details.get("path"), rank) in QUICK else [pytest.mark.slow],
    )
    for phase, details in PHASES
    for rank in (0, 1, None)
    if rank != 1 or phase == "file"
]


@pytest.mark.parametrize(("phase", "details", "rank"), KILLED)
def test_killed_in_a_phase(
    two_ranks: RankPool,
    tmp_path: Path,
    uninterrupted: Config,
    phase: str,
    details: Any,
    rank: int | None,
) -> None:
    config = two_engines(tmp_path, checkpoint={"keep_last": 1})
    step = {} if phase.startswith("prun") else {"step": 4}
    with pytest.raises(RankError, match="died with exit code -9"):
        two_ranks.run(train_with, config, [(phase, {**details, **step, "rank": rank})])
    two_ranks.run(run_in_world, config)
    text = log_text(config)
    assert "resumed from" in text and "skipped:" not in text
    assert_equal(final_weights(config), final_weights(uninterrupted))
    entries = sorted(path.name for path in (config.run_dir / "checkpoints").iterdir())
    assert entries == ["latest", "step-00000006"]


@pytest.mark.parametrize("background", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("rounds", [4, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.timeout(1800)
def test_killed_at_random_moments(
    two_ranks: RankPool, tmp_path: Path, rounds: int, background: bool
) -> None:
    table = {"run": {"steps": 3}, "task": WIDE, "trainer": {"save_every": 1}}
    settings = {"background": background, "keep_last": 2}
    uninterrupted = tiny_config(tmp_path / "uninterrupted", 1, **table)
    two_ranks.run(run_in_world, uninterrupted)
    chance = random.Random(rounds)
    for number in range(rounds // 2):
        config = tiny_config(tmp_path / str(number), 1, checkpoint=settings, **table)
        killed = chance.choice([0, 1, None])
        fuse = {"seconds": chance.uniform(0, 0.4), "step": 2, "rank": killed}
        with pytest.raises(RankError, match="died with exit code -9"):
            two_ranks.run(train_with, config, [("during", fuse)])
        left = [read_manifest(p).step for p in checkpoints_in(config.run_dir / "checkpoints")]
        assert left and max(left) >= 1, "more than one save interval was lost"
        two_ranks.run(run_in_world, config)
        assert_equal(final_weights(config), final_weights(uninterrupted))


@pytest.mark.parametrize(
    ("phase", "rank", "background"),
    quick(
        [
            (*where, background)
            for where in (("file", 0), ("file", 1), ("rename", 0), ("room", 0))
            for background in (False, True)
        ],
        ("file", 0, True),
        ("file", 1, False),
        ("rename", 0, False),
        ("room", 0, True),
    ),
)
def test_an_io_error_fails_one_save_on_all_ranks_and_the_run_continues(
    two_ranks: RankPool,
    tmp_path: Path,
    uninterrupted: Config,
    phase: str,
    rank: int,
    background: bool,
) -> None:
    config = two_engines(tmp_path, checkpoint={"background": background})
    fault = {"step": 4, "rank": rank, "kind": io_error}
    two_ranks.run(train_with, config, [(phase, fault)])
    text = log_text(config)
    assert text.count("Input/output error (injected)") >= 1
    assert "the run continues, and the next save tries again" in text
    names = sorted(path.name for path in (config.run_dir / "checkpoints").glob("step-*"))
    assert names[0] == "step-00000002" and names[-1] == "step-00000006"
    assert "step-00000004" not in names
    assert_equal(final_weights(config), final_weights(uninterrupted))


def slow_io_error() -> None:
    """Fails as a broken disk does, when the next save is due already."""
    time.sleep(1)
    io_error()


def test_a_late_failure_does_not_fail_the_next_save(two_ranks: RankPool, tmp_path: Path) -> None:
    trainer = {"save_every": 2, "export_at_end": False}
    config = tiny_config(tmp_path, 1, trainer=trainer, checkpoint={"background": True})
    fault = {"step": 2, "rank": 1, "kind": slow_io_error}
    two_ranks.run(train_with, config, [("file", fault)])
    found = checkpoints_in(config.run_dir / "checkpoints")
    assert [read_manifest(path).step for path in found] == [6, 4]


def test_an_io_error_ends_the_run_if_so_configured(two_ranks: RankPool, tmp_path: Path) -> None:
    config = two_engines(tmp_path, checkpoint={"on_error": "stop"})
    with pytest.raises(RankError, match="CheckpointError") as caught:
        two_ranks.run(train_with, config, [("file", {"rank": 1, "kind": io_error})])
    assert str(caught.value).count("rank 1: OSError: [Errno 5]") >= 2


def test_the_last_save_must_not_fail(two_ranks: RankPool, tmp_path: Path) -> None:
    config = two_engines(tmp_path)
    with pytest.raises(RankError, match="CheckpointError"):
        two_ranks.run(train_with, config, [("file", {"rank": 1, "step": 6, "kind": io_error})])


@pytest.mark.parametrize("foreseen", [True, False])
def test_a_full_disk(two_ranks: RankPool, tmp_path: Path, foreseen: bool) -> None:
    """38 MB a checkpoint: the first one fits into 60 MB, the second does not."""
    config = tiny_config(
        tmp_path,
        1,
        task={"args": {"width": 1500}},
        trainer={"save_every": 2, "export_at_end": False},
    )
    with small_disk(tmp_path, "60m"):
        two_ranks.run(error_without_a_size if not foreseen else error_of, config)
        text = log_text(config)
        reason = "MB are free" if foreseen else "OSError: [Errno 28] No space left on device: '/"
        assert text.count(reason) >= 1, text
        assert len(losses(config)) == 6
        names = [path.name for path in (config.run_dir / "checkpoints").glob("step-*")]
        assert names == ["step-00000002"]


def test_an_export_that_fails_costs_no_step(two_ranks: RankPool, tmp_path: Path) -> None:
    """9 MB of weights do not fit into 4 MB; no partial export is left."""
    config = tiny_config(
        tmp_path,
        2,
        task={"args": {"width": 1500}},
        trainer={"export_every": 2, "export_at_end": False},
    )
    directory = config.run_dir / "exports"
    with small_disk(directory, "4m"):
        assert two_ranks.run(error_of, config) == ["", ""]
        text = log_text(config)
        assert text.count("cannot export") == text.count("the next export tries again") == 2
        assert len(losses(config)) == 6 and not list(directory.iterdir())


def error_without_a_size(config: Config) -> str:
    """`error_of` where saves are taken to need no room."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.checkpoint.save.bytes_of", lambda tree: 0)
        return error_of(config)


@pytest.mark.parametrize(
    ("phase", "background"),
    quick(
        [(phase, background) for phase in ("room", "manifest") for background in (False, True)],
        ("room", True),
        ("manifest", False),
    ),
)
def test_a_disk_that_becomes_read_only(
    two_ranks: RankPool, tmp_path: Path, uninterrupted: Config, phase: str, background: bool
) -> None:
    """In the save of step 4; it is writable again when the one of step 6 begins."""
    config = two_engines(tmp_path, checkpoint={"background": background})
    disk = config.run_dir / "checkpoints"
    locks = {"step": 4, "rank": 0, "kind": partial(remount, disk, "ro")}
    unlocks = {"step": 6, "rank": 0, "kind": partial(remount, disk, "rw")}
    with small_disk(disk, "60m"):
        two_ranks.run(train_with, config, [(phase, locks), ("room", unlocks)])
        text = log_text(config)
        place = disk / "step-00000004"
        assert f"cannot save {place}: [Errno 30] Read-only file system: '{place}.tmp" in text
        assert "the run continues, and the next save tries again" in text
        assert [read_manifest(path).step for path in checkpoints_in(disk)] == [6, 2]
        assert (disk / "latest").read_text() == "step-00000006\n"
    assert_equal(final_weights(config), final_weights(uninterrupted))


def remount(disk: Path, access: str) -> None:
    """Makes a file system read-only, or writable again."""
    subprocess.run(["mount", "-o", f"remount,{access}", str(disk)], check=True)


def test_a_failed_commit_leaves_nothing(two_ranks: RankPool, tmp_path: Path) -> None:
    config = two_engines(tmp_path)
    two_ranks.run(train_with, config, [("manifest", {"step": 4, "rank": 0, "kind": io_error})])
    names = sorted(path.name for path in (config.run_dir / "checkpoints").iterdir())
    assert names == ["latest", "step-00000002", "step-00000006"]


def test_a_damaged_checkpoint_is_skipped(two_ranks: RankPool, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, trainer={"save_every": 2})
    two_ranks.run(run_in_world, config)
    uninterrupted = losses(config)
    path = checkpoint(config, 6) / "net/mp_rank_00_model_states.pt"
    flip_bit(path)
    two_ranks.run(run_in_world, config)
    text = log_text(config)
    assert "skipped:" in text and str(path) in text
    assert f"resumed from {checkpoint(config, 4)}" in text
    assert losses(config) == uninterrupted
