"""`harness inspect` describes files, and runs no code that is in them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harness.checkpoint.inspect import describe_path
from harness.cli import main
from harness.config import Config
from harness.errors import CheckpointError
from harness.run import run_in_world
from harness.testing.pool import RankPool
from tests.support.helpers import checkpoint, exports, tiny_config


@pytest.fixture(scope="module")
def run(two_ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = tiny_config(tmp_path_factory.mktemp("run"), 2, trainer={"save_every": 3})
    two_ranks.run(run_in_world, config)
    return config


@pytest.mark.parametrize("verify", [False, True])
def test_a_run_and_its_checkpoints(run: Config, verify: bool) -> None:
    text = "\n".join(describe_path(run.run_dir, verify))
    assert text.index("step 6, 2 ranks, saved ") < text.index("step 3, 2 ranks, saved ")
    assert text.count("engine net: ZeRO stage 2, torch.float32") == 2
    assert "eval/loss" in text and "rank-00001.pt" in text
    assert text.count("every CRC checked: complete" if verify else "sizes checked: complete") == 2
    alone = "\n".join(describe_path(checkpoint(run, 3)))
    assert alone in text or verify


def test_a_run_is_described_without_torch(run: Config) -> None:
    code = (
        "import sys; from harness.cli import main; sys.argv = ['harness', 'inspect', sys.argv[1]]; "
        "main(); print(sorted({'torch', 'deepspeed', 'pydantic', 'numpy'} & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", code, str(run.run_dir)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert lines[:-1] == list(describe_path(run.run_dir)) and lines[-1] == "[]"


def test_deepspeeds_own_files(run: Config) -> None:
    net = checkpoint(run, 6) / "net"
    model = list(describe_path(net / "mp_rank_00_model_states.pt"))
    assert any("module.first.weight" in line and "[16, 6]" in line for line in model)
    shard = list(describe_path(net / "zero_pp_rank_1_mp_rank_00_optim_states.pt"))
    assert any("exp_avg_sq" in line for line in shard)


def test_an_export(run: Config) -> None:
    lines = list(describe_path(exports(run) / "net.sft"))
    assert "7 tensors" in lines[0]
    assert any("again.weight" in line and "= middle.weight" in line for line in lines) or any(
        "middle.weight" in line and "= again.weight" in line for line in lines
    )
    assert any("first.weight" in line and "F32" in line and "[16, 6]" in line for line in lines)


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"a": Code(), "b": torch.ones(2, 3)}, tmp_path / "x.pt")
    assert any("[2, 3]" in line for line in describe_path(tmp_path / "x.pt"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["x.pt", "x.sft", "x"])
@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"\x02\0\0\0\0\0\0\0[]"])
def test_what_cannot_be_read_is_one_message(
    tmp_path: Path, name: str, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr("sys.argv", ["harness", "inspect", str(tmp_path / name)])
        main()
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / name}: not a ")


def test_damage_is_reported(run: Config) -> None:
    directory = checkpoint(run, 3)
    path = directory / "rank-00000.pt"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=r"rank-00000\.pt: damaged: \d+ bytes, expected"):
        list(describe_path(directory))
    lines: list[str] = []
    with pytest.raises(
        CheckpointError, match=r"tiny: damaged or incomplete on this host: step-00000003$"
    ):
        lines.extend(describe_path(run.run_dir))
    path.write_bytes(data)
    assert sum("sizes checked: complete" in line for line in lines) == 1
    assert sum("rank-00000.pt: damaged: " in line for line in lines) == 1
