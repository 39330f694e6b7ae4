"""The best checkpoint: linked by the run, marked by `inspect`, exported by `convert --best`."""

import shutil
from pathlib import Path

import pytest

from harness.checkpoint.best import link_best
from harness.checkpoint.inspect import describe, describe_path
from harness.checkpoint.retention import prune, remove
from harness.cli import main
from harness.config.sections import CheckpointConfig
from harness.convert.run_checkpoints import checkpoints_in, linked_in
from harness.io import load
from harness.testing.pool import RankPool
from tests.checkpoint.test_dropped import copied_at_once
from tests.checkpoint.test_retention import NAN, make
from tests.support.helpers import assert_equal, tiny_config


def test_the_link_follows_what_the_config_calls_best(tmp_path: Path) -> None:
    lowest, highest = CheckpointConfig(), CheckpointConfig(best_mode="max", keep_last=1)
    found = []
    for step, loss in enumerate((None, 3.0, 1.0, NAN, 2.0), start=1):
        make(tmp_path, step, loss)
        link_best(tmp_path, lowest)
        found.append(linked_in(tmp_path))
    steps = [path and int(path.name.removeprefix("step-")) for path in found]
    assert steps == [None, 2, 3, 3, 3]
    make(tmp_path, 6, 0.5, finite=False)
    link_best(tmp_path, lowest)
    assert (tmp_path / "best").readlink() == Path("step-00000003")
    link_best(tmp_path, highest)
    assert (tmp_path / "best").resolve() == tmp_path / "step-00000002"
    prune(tmp_path, highest)  # of those that are left
    link_best(tmp_path, highest)
    assert (tmp_path / "best").readlink() == Path("step-00000005")
    for path in checkpoints_in(tmp_path):
        remove(path)
    link_best(tmp_path, highest)
    assert not (tmp_path / "best").is_symlink()
    assert not list(tmp_path.glob(".*"))


def test_a_step_that_is_saved_again_is_judged_again(tmp_path: Path) -> None:
    make(tmp_path, 1, 1.0)
    link_best(tmp_path, CheckpointConfig())
    make(tmp_path, 2, 2.0)
    link_best(tmp_path, CheckpointConfig())
    remove(tmp_path / "step-00000001")
    make(tmp_path, 1, 3.0)
    link_best(tmp_path, CheckpointConfig())
    assert linked_in(tmp_path) == tmp_path / "step-00000002"
    assert linked_in(tmp_path / "step-00000001") is None


def test_a_run_links_its_best_checkpoint(
    two_ranks: RankPool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url = f"file://{tmp_path}/store/tiny"
    settings = {"best_mode": "max", "remote": f"file://{tmp_path}/store"}  # the first one, by loss
    trainer = {"save_every": 2, "eval_every": 2, "export_every": 2}
    config = tiny_config(tmp_path, 2, trainer=trainer, checkpoint=settings)
    two_ranks.run(copied_at_once, config)
    best = config.run_dir / "checkpoints/step-00000002"
    lines = list(describe_path(config.run_dir))
    marked = [line.partition(":")[0] for line in lines if line.endswith(", the best")]
    assert marked == [str(best)]
    log = (config.run_dir / "log.txt").read_text()
    assert f"best saved by eval/loss: {best}" in log and f"{config.run_dir}.sft --best" in log
    target = tmp_path / "best.sft"
    words = ["harness", "convert", str(config.run_dir), str(target), "--best"]
    monkeypatch.setattr("sys.argv", words)
    main()
    assert "note: the best checkpoint is step-00000002" in capsys.readouterr().out
    assert_equal(load(target), load(config.run_dir / f"exports/{best.name}/net.sft"))
    (stored,) = (line.partition(": ")[0] for line in describe(url) if line.endswith(", the best"))
    assert stored.startswith(f"{url}/{best.name}.")
    words[2:] = [url, str(tmp_path / "stored.sft"), "--best"]
    main()
    assert f"note: the best checkpoint is {best.name}." in capsys.readouterr().out
    assert_equal(load(tmp_path / "stored.sft"), load(target))
    shutil.rmtree(stored.removeprefix("file://"))
    with pytest.raises(SystemExit, match="2"):
        main()
    assert f"{url}: no checkpoint is linked as" in capsys.readouterr().err
    words[2] = str(config.run_dir)
    (config.run_dir / "checkpoints/best").unlink()
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "no checkpoint is linked as checkpoints/best" in capsys.readouterr().err
