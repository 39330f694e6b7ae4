"""`harness.launch`: ranks on this machine, and how they end."""

from pathlib import Path

import pytest

import harness
from harness.errors import ConfigError, TaskError
from tests import test_api
from tests.support.helpers import ROOT


def test_ranks_train_together(tmp_path: Path) -> None:
    config = test_api.tables(tmp_path, stage=2)
    result = harness.launch(test_api.build, ranks=2, config=config)
    assert result.metrics["samples"] == 4 * 2 * 4 and result.ended == "complete"


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
