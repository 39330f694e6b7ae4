"""Where the time of a run goes, over all its starts: goodput.jsonl."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from harness.checkpoint.inspect import describe_path
from harness.config import Config
from harness.errors import Kind
from harness.health.goodput import (
    FILE,
    KINDS,
    Ledger,
    read,
    seconds_by_kind,
    seconds_in_starts,
    table,
)
from harness.health.outcome import Outcome
from harness.health.phases import Phase
from harness.metrics.status import Status, format_duration
from harness.report.run_files import RunFiles
from harness.report.summary import summarize
from harness.run import run_in_world
from harness.testing.pool import RankPool
from tests.support.helpers import Pools, tiny_config


class Clock:
    """Both clocks; a start of the run, in it."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch):
        self.now = 1000.0
        self.directory = directory
        monkeypatch.setattr(time, "time", lambda: self.now)
        monkeypatch.setattr(time, "monotonic", lambda: self.now - 900)

    def start(self, step: int, seconds: float = 3.0) -> None:
        """A process that takes so long to begin."""
        began = self.now
        self.now += seconds
        self.status = Status(step, 100)
        self.ledger = Ledger(self.directory, step, began)
        self.status.on_activity = self.ledger.enter

    def steps(self, *steps: int, **more: Any) -> None:
        """Of a second each; their records are reported at once."""
        for step in steps:
            self.now += 1
            self.status.stepped(step)
            self.ledger.write({"step": step, "step_time_s": 1.0, **more})
            os.utime(self._touched(), (self.now, self.now))

    def do(self, phase: Phase, seconds: float) -> None:
        with self.status.doing(phase):
            self.now += seconds

    def _touched(self) -> Path:
        path = self.directory / "metrics.jsonl"
        path.touch()
        return path

    def spent(self) -> dict[str, float]:
        """Seconds by kind, without those that are 0."""
        found = seconds_by_kind(self.directory / FILE)
        return {kind: round(seconds, 6) for kind, seconds in found.items() if seconds > 1e-9}


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(tmp_path, monkeypatch)


def test_a_run_without_faults(clock: Clock) -> None:
    clock.start(0)
    clock.do("evaluation", 2)
    clock.steps(1, 2, 3)
    clock.do("save", 5)
    clock.steps(4, skipped=1)
    clock.steps(5, skipped=1)
    clock.do("paused", 7)
    clock.do("export", 4)
    clock.ledger.close()
    spent = {"starting": 3, "evaluating": 2, "steps": 4, "skipped": 1, "saving": 5, "waiting": 7}
    assert clock.spent() == spent | {"exporting": 4} and sum(clock.spent().values()) == 26
    where = [(record["from"], record["step"]) for record in read(clock.directory / FILE)]
    assert where == [(0, 0), (0, 3), (3, 5)]  # at the start, at the save, at the end


def test_a_killed_run_repeats_its_steps(clock: Clock) -> None:
    """Those since the save have no line; when the last one ended, metrics.jsonl tells."""
    clock.start(0)
    clock.steps(1, 2, 3)
    clock.do("save", 5)
    clock.steps(4, 5)
    clock.now += 60
    clock.start(3)
    clock.steps(4, 5, 6)
    clock.ledger.close()
    spent = {"starting": 6, "steps": 6, "saving": 5, "repeated": 2, "waiting": 60}
    assert clock.spent() == spent and clock.now == 1000 + sum(spent.values())
    lines = read(clock.directory / FILE)
    assert seconds_in_starts(lines) == pytest.approx(clock.now - 1000 - 60)
    clock.now += 500  # after the end
    clock.start(6)
    clock.do("paused", 7)
    clock.ledger.close()
    assert seconds_in_starts(read(clock.directory / FILE)) == pytest.approx(19 + 3 + 7)


@pytest.mark.parametrize("kind", ["complete", "quit", "signal", "task"])
def test_a_run_that_was_over_was_not_to_train_until_it_is_extended(
    clock: Clock, kind: Kind
) -> None:
    clock.start(0)
    clock.steps(1, 2)
    Outcome(kind, 0).write(clock.directory)
    clock.ledger.close()
    clock.now += 30_000
    os.utime(clock.directory / "metrics.jsonl", (clock.now, clock.now))  # the run was copied
    (clock.directory / "ended.json").unlink()
    clock.now += 10_000
    clock.start(2)
    clock.steps(3)
    clock.now += 60  # killed: this time is counted, whatever was before it
    clock.start(2)
    clock.steps(3)
    clock.ledger.close()
    spent = {"starting": 9, "steps": 3, "repeated": 1, "waiting": 60}
    if kind in ("complete", "quit"):
        assert clock.spent() == spent
    else:  # up to the last record of metrics.jsonl it counts as training
        assert clock.spent() == spent | {"repeated": 30_001, "waiting": 10_060}
    assert seconds_in_starts(read(clock.directory / FILE)) == pytest.approx(
        sum(clock.spent().values()) - clock.spent()["waiting"]
    )


def test_an_ended_run_that_could_not_save_repeats_its_steps(clock: Clock) -> None:
    """What the last line counted as steps is not, once the next start begins before them."""
    clock.start(0)
    clock.steps(1, 2)
    clock.do("save", 5)
    clock.steps(3, 4, 5, 6)
    clock.ledger.close()
    assert clock.spent()["steps"] == 6
    clock.start(4)  # someone has pinned it
    clock.steps(5, 6)
    clock.ledger.close()
    spent = {"starting": 6, "steps": 6, "saving": 5, "repeated": 2}
    assert clock.spent() == spent
    clock.start(0)
    clock.ledger.close()
    assert clock.spent() == {"starting": 9, "saving": 5, "repeated": 8}


def test_a_rollback_repeats_steps_within_a_start(clock: Clock) -> None:
    clock.start(0)
    clock.steps(1, 2)
    clock.do("save", 5)
    clock.steps(3, 4, 5)
    clock.ledger.write({"step": 2, "event": "rollback"})
    clock.steps(3, 4, 5, 6)
    clock.do("save", 1)
    clock.ledger.close()
    assert clock.spent() == {"starting": 3, "steps": 6, "saving": 6, "repeated": 3}


def test_a_cut_line_is_passed_over(clock: Clock) -> None:
    clock.start(0)
    with (clock.directory / FILE).open("a") as file:
        file.write('{"began": 1003.0, "time": 10')
    clock.now += 10
    clock.start(0)
    clock.steps(1)
    clock.ledger.close()
    assert clock.spent() == {"starting": 6, "waiting": 10, "steps": 1}
    assert next(table(clock.directory / FILE)).endswith(f"{FILE}: 17.0 s, 2 starts")


def test_a_run_in_an_old_process_does_not_begin_with_it(clock: Clock) -> None:
    """Nor before the run that was in the same process."""
    clock.start(0)
    clock.steps(1)
    clock.ledger.close()
    Ledger(clock.directory, 1, began=5.0).close()
    assert clock.spent() == {"starting": 3, "steps": 1}


def end_after_step_4(config: Config) -> None:
    """Trains, and ends after step 4 on all ranks, without saving it."""
    original = Status.stepped

    def stepped(self: Status, step: int) -> None:
        original(self, step)
        if step == 4:
            raise KeyError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(Status, "stepped", stepped)
        patch.setattr("harness.trainer.rescue", lambda *_: None)
        run_in_world(config)


def start_a_day_later(config: Config, steps: int) -> None:
    """The run, as if all starts before had been a day earlier."""
    path = config.run_dir / FILE
    earlier = [r | {k: r[k] - 86_400 for k in ("began", "time")} for r in read(path)]
    if earlier:
        path.write_text("".join(json.dumps(record) + "\n" for record in earlier))
    run = config.run.model_copy(update={"steps": steps})
    run_in_world(config.model_copy(update={"run": run}))


def test_the_nights_of_a_run_that_is_extended_are_no_part_of_it(
    pools: Pools, tmp_path: Path
) -> None:
    """After a `quit`, and after all steps: `harness report` shows the time of the starts alone."""
    config = tiny_config(tmp_path, events=[{"command": "quit", "at": 2}])
    for steps in (4, 4, 6):
        pools(1).run(start_a_day_later, config, steps)
    lines = read(config.run_dir / FILE)
    assert [line["ended"] for line in lines if "ended" in line] == ["quit", "complete", "complete"]
    firsts = [line for line in lines if "starting" in line]
    assert [(r["from"], r["waiting"], r["repeated"]) for r in firsts] == [
        (at, 0, 0) for at in (0, 2, 4)
    ]
    spent = seconds_by_kind(config.run_dir / FILE)
    assert lines[-1]["time"] - lines[0]["began"] > 2 * 86_400 > 86_400 > sum(spent.values())
    figures = summarize(RunFiles(config.run_dir)).figures
    assert figures["Time"] == format_duration(sum(spent.values()))
    assert figures["Goodput"] == f"{spent['steps'] / sum(spent.values()):.1%}"


def test_it_adds_up_to_the_time_of_the_run(two_ranks: RankPool, tmp_path: Path) -> None:
    """Over two starts, and `harness inspect` shows it."""
    config = tiny_config(tmp_path, trainer={"save_every": 2, "eval_every": 3})
    began = time.time()
    two_ranks.run(end_after_step_4, config)
    two_ranks.run(run_in_world, config)
    records = read(config.run_dir / FILE)
    spent = seconds_by_kind(config.run_dir / FILE)
    assert sum(spent.values()) == pytest.approx(records[-1]["time"] - records[0]["began"], abs=1e-3)
    assert began < records[0]["began"] < records[-1]["time"] < time.time()
    assert sum("starting" in record for record in records) == 2
    for kind in KINDS.keys() - {"skipped"}:
        assert spent[kind] > 0, kind
    lines = list(describe_path(config.run_dir))
    assert lines[0].startswith(f"{config.run_dir / FILE}: ") and lines[0].endswith(" s, 2 starts")
    assert [line.split()[0] for line in lines[1 : 1 + len(KINDS)]] == list(KINDS)
    assert lines[1].endswith("%  that count")
