"""Saves that fail: the command that asked is answered once, and the log says what happens next."""

import json
from pathlib import Path
from typing import Any

import pytest

from harness import distributed
from harness.config import Config
from harness.engine.engines import Engines
from harness.errors import HarnessError
from harness.testing.faults import fail_at, io_error
from harness.testing.pool import RankPool
from tests.support.commanded import commanded
from tests.support.helpers import log_text, records, tiny_config


def with_stdin(directory: Path, **overrides: Any) -> Config:
    return tiny_config(directory, 1, control={"stdin": True}, **overrides)


def ends(config: Config) -> list[tuple[str, str, str]]:
    """`(command, state, result)` of every last answer in the audit log."""
    lines = (config.run_dir / "commands.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in lines]
    final = [a for a in answers if a["state"] in ("done", "failed", "rejected")]
    return [(a["text"], a["state"], a["result"]) for a in final]


def state_raises(config: Config) -> None:
    """A run whose engines' state cannot be taken at step 3."""
    state_dict = Engines.state_dict

    def broken(self: Engines) -> dict[str, Any]:
        if self.global_step == 3:
            raise KeyError("no such state")
        return state_dict(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engines, "state_dict", broken)
        commanded(config, "event save@3\n")


def test_any_error_of_a_save_command_is_its_answer(two_ranks: RankPool, tmp_path: Path) -> None:
    config = with_stdin(tmp_path)
    two_ranks.run(state_raises, config)
    assert len(records(config)) == 6
    saves = [(state, result) for text, state, result in ends(config) if text == "save"]
    assert [state for state, _ in saves] == ["failed"]
    assert "no such state" in saves[0][1]


def write_fails(config: Config, text: str, step: int) -> tuple[str, bool]:
    """The error that ends a run whose files of a step cannot be written on rank 1."""
    with (
        fail_at("file", step=step, rank=1, kind=io_error),
        pytest.raises(HarnessError) as caught,
    ):
        commanded(config, text)
    return str(caught.value), caught.value.on_all_ranks


def test_a_save_command_that_finds_an_earlier_failure_is_answered(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    """The background save of step 2 fails, which `save as b` at the same step finds out."""
    stop = {"background": True, "on_error": "stop"}
    config = with_stdin(tmp_path, checkpoint=stop)
    errors = two_ranks.run(write_fails, config, "event save as a@2\nevent save as b@2\n", 2)
    assert all("Input/output error" in text and on_all_ranks for text, on_all_ranks in errors)
    saves = {text: (state, result) for text, state, result in ends(config) if "save as" in text}
    assert len([text for text, _, _ in ends(config) if text in ("save as a", "save as b")]) == 2
    for text in ("save as a", "save as b"):
        assert saves[text][0] == "failed" and "Input/output error" in saves[text][1]


def evaluation_and_rescue_fail(config: Config) -> None:
    """An error that all ranks agree on ends the run, and the save before it fails as well."""

    def fail(self: Engines, step: int, samples: int, tokens: int) -> None:
        if step == 4:
            with distributed.raise_on_all_ranks("counting"):
                raise HarnessError("no more steps")
        count(self, step, samples, tokens)

    count = Engines.count
    with (
        pytest.MonkeyPatch.context() as patch,
        fail_at("file", rank=1, kind=io_error),
        pytest.raises(HarnessError, match="no more steps"),
    ):
        patch.setattr(Engines, "count", fail)
        commanded(config, "")


def test_a_failed_save_at_the_end_is_not_announced_to_be_retried(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    config = with_stdin(tmp_path)
    two_ranks.run(evaluation_and_rescue_fail, config)
    text = log_text(config)
    assert "saving a checkpoint before the run ends" in text
    assert "cannot save" in text and "the next save tries again" not in text
