"""`harness.launch`: ranks on this machine, and how they end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import harness
from harness.errors import ConfigError, TaskError
from harness.local_ranks import PRELOADED, preloaded
from tests import test_api
from tests.support.helpers import ROOT


def test_ranks_train_together(tmp_path: Path) -> None:
    config = test_api.tables(tmp_path, stage=2)
    result = harness.launch(test_api.build, ranks=2, config=config)
    assert result.metrics["samples"] == 4 * 2 * 4 and result.ended == "complete"


ASKING = """
import importlib, torch

def is_available():
    print("asked for GPUs")
    return False

torch.cuda.device_count = lambda: 1
torch.cuda.is_available = is_available
torch.backends.cuda.is_built = lambda: True
from harness.local_ranks import preloaded
for name in preloaded():
    importlib.import_module(name)
"""


@pytest.mark.slow
@pytest.mark.parametrize("accelerator", [None, "cpu"])
def test_the_parent_of_the_ranks_does_not_ask_for_gpus(accelerator: str | None) -> None:
    """It would be "Cannot re-initialize CUDA in forked subprocess" in every rank."""
    environment = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"}
    environment |= {"DS_ACCELERATOR": accelerator} if accelerator else {}
    command = [sys.executable, "-c", ASKING]
    asked = subprocess.check_output(command, env=environment, text=True)
    assert not asked


def test_with_a_torch_for_gpus_nothing_is_imported_for_the_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    assert preloaded() == []
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert preloaded() == PRELOADED


@pytest.mark.slow
def test_ranks_train_without_anything_imported_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.local_ranks.preloaded", list)
    test_ranks_train_together(tmp_path)


@pytest.mark.slow
def test_an_error_of_all_ranks_is_raised_once(tmp_path: Path) -> None:
    config = test_api.tables(tmp_path, stage=2)
    task, wrong = ROOT / "tests/tasks/tiny_task.py", {"task.args": {"raise": True}}
    with pytest.raises(TaskError, match="RuntimeError: the task is unwell"):
        harness.launch(task, ranks=2, config=config, overrides=wrong)


def test_a_task_that_cannot_be_sent_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.local_ranks.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="put it into a file, or pip install cloudpickle"):
        harness.launch(lambda config: test_api.build(), ranks=2, config=test_api.tables(tmp_path))
