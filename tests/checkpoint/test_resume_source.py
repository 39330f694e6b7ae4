"""What `run.resume` may name: convert, inspect and init_from take the same checkpoint."""

import json
from pathlib import Path

import pytest
import torch

from harness.checkpoint.resume_source import locate
from harness.errors import HarnessError
from harness.run import run_in_world
from harness.testing.pool import RankPool
from tests.support.helpers import error_of, exports, tiny_config


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """Checkpoints of which only the manifests are there."""
    for step, name in ((2, ""), (4, ""), (4, "-best")):
        directory = tmp_path / f"run/checkpoints/step-{step:08d}{name}"
        (directory / "net").mkdir(parents=True)
        manifest = {"saved_at": step + len(name)}
        (directory / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "run/checkpoints/latest").write_text("step-00000004-best")
    return tmp_path / "run/checkpoints"


def test_a_path_or_a_step_is_found(parent: Path) -> None:
    for path in (parent, parent.parent, parent / "latest", Path(f"{parent}/")):
        assert locate(str(path), Path("none")) == (parent, True)
    two = parent / "step-00000002"
    for wanted in ("2", str(two), f"{two}/"):
        assert locate(wanted, parent) == (two, False)
    assert locate("4", parent) == (parent / "step-00000004-best", False)
    with pytest.MonkeyPatch.context() as patch:  # a path in the run is named as the run names it
        patch.chdir(parent.parent.parent)
        own = Path("run/checkpoints")
        for path in (two, own / "step-00000002", Path("run/../run/checkpoints/step-00000002")):
            assert locate(str(path), own) == (own / two.name, False)
        assert locate(str(parent.parent), own) == (own, True)
    two.rename(parent.parent / "kept")
    assert locate(str(parent.parent / "kept"), parent) == (parent.parent / "kept", False)


def test_another_path_is_named(parent: Path, tmp_path: Path) -> None:
    torch.save({}, tmp_path / "net.pt")
    (tmp_path / "plain/global_step2").mkdir(parents=True)
    (tmp_path / "plain/latest").write_text("global_step2")
    for wanted, message in {
        "3": "has no checkpoint of step 3; its steps: 2, 4",
        str(tmp_path / "nope"): "nope: no such file or directory",
        str(parent / "step-00000002/net"): r"is a part of a checkpoint: .*step-00000002$",
        str(tmp_path / "net.pt"): r"is a file: .*with engines\.NAME\.init_from",
        str(tmp_path / "plain"): r"of plain DeepSpeed: .*with engines\.NAME\.init_from",
        str(tmp_path): "is no directory of checkpoints of harness",
    }.items():
        with pytest.raises(HarnessError, match=message):
            locate(wanted, parent)


def test_a_run_resumes_from_another_run(two_ranks: RankPool, tmp_path: Path) -> None:
    base = tiny_config(tmp_path / "base", run={"steps": 4}, trainer={"save_every": 2})
    two_ranks.run(run_in_world, base)
    expected = None
    for number, resume in enumerate((base.run_dir, base.run_dir / "checkpoints/latest")):
        config = tiny_config(
            tmp_path / str(number),
            run={"steps": 6, "resume": str(resume)},
            trainer={"save_every": 2},
        )
        two_ranks.run(run_in_world, config)
        assert not (config.run_dir / "checkpoints/step-00000004").exists()
        found = (exports(config) / "net.sft").read_bytes()
        assert found == (expected or found)
        expected = found
    newest = base.run_dir / "checkpoints/step-00000004"
    next((newest / "net").glob("*model_states.pt")).write_bytes(b"")
    config = tiny_config(tmp_path / "older", run={"steps": 6, "resume": str(base.run_dir)})
    two_ranks.run(run_in_world, config)
    config = tiny_config(tmp_path, run={"resume": str(tmp_path / "nope")})
    assert "no such file or directory" in str(two_ranks.run(error_of, config)[0])
