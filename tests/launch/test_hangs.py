"""Runs that hang, or lose a rank, under the real launchers: who is named, and how the job ends."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from harness.health.outcome import Outcome
from tests.support.helpers import ROOT
from tests.support.jobs import log_of, start, until

BOUNDS = "--health.timeouts={data=3, forward=3, backward=3, step=3}"
PERSISTENT = "--engines.net.ds_overrides.zero_optimization.stage3_param_persistence_threshold=0"
STEP = 4


@dataclass
class Ended:
    """A job that has ended."""

    outcome: Outcome
    told: Outcome | None
    log: str
    terminal: str
    stacks: dict[str, str]
    code: int


def run(directory: Path, launcher: str, how: str, rank: int, stage: int) -> Ended:
    done = start(
        launcher,
        directory,
        f"--task.path={ROOT}/tests/tasks/hanging_task.py",
        f'--task.args={{how="{how}", rank={rank}, at={STEP}}}',
        f"--engines.net.ds_config={ROOT}/ds_configs/zero{stage}.json",
        *([PERSISTENT] if stage == 3 else []),
        "--run.steps=8",
        BOUNDS,
    )
    place = directory / "runs/tiny"
    outcome = Outcome.read(place / "ended.json")
    assert outcome is not None, done.stderr
    stacks = {path.name: path.read_text() for path in place.glob("stacks/*")}
    told = Outcome.read(directory / "outcome.json")
    return Ended(outcome, told, log_of(directory), done.stderr, stacks, done.returncode)


@pytest.fixture(autouse=True)
def outcome_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HARNESS_OUTCOME", str(tmp_path / "outcome.json"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    yield
    until(lambda: not left_of(tmp_path))


def left_of(directory: Path) -> list[int]:
    """The processes, watchdogs included, of the job below `directory`."""
    found = []
    for process in psutil.process_iter(["environ"]):
        named = (process.info["environ"] or {}).get("HARNESS_OUTCOME", "")
        if named.startswith(str(directory)) and process.pid != psutil.Process().pid:
            found.append(process.pid)
    return found


@pytest.mark.parametrize(
    ("launcher", "how", "rank", "stage"),
    [
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("python", "sleep", 0, 2),
                ("torchrun", "sleep", 1, 0),
                ("torchrun", "sleep", 0, 3),
                ("torchrun", "gil", 1, 2),
                ("deepspeed", "gil", 0, 3),
                ("torchrun", "stop", 1, 0),
                ("deepspeed", "stop", 1, 3),
                ("torchrun", "sleep", -1, 2),
                ("torchrun", "collective", 1, 0),
                ("torchrun", "collective", 1, 3),
                ("deepspeed", "sleep", 1, 2),
                ("python", "gil", 0, 0),
            ]
        ),
    ],
)
def test_a_hang(tmp_path: Path, launcher: str, how: str, rank: int, stage: int) -> None:
    """The run is over long before run.timeout_s, which is 60 s."""
    ended = run(tmp_path, launcher, how, rank, stage)
    outcome = ended.outcome
    assert (outcome.kind, outcome.code, outcome.step) == ("hang", 75, STEP), outcome
    assert outcome.phase == "forward" and ended.told is not None and ended.told.kind == "hang"
    is_unclear = rank == -1 or (how == "collective" and stage == 3)  # both are in collectives
    assert outcome.rank == (None if is_unclear else rank)
    assert ended.log.count("the run hangs: ") == ended.terminal.count("the run hangs: ") == 1
    ranks = range(1 if launcher == "python" else 2)
    assert set(ended.stacks) == {f"step-{STEP:08d}-rank-{rank}.txt" for rank in ranks}
    culprit = ended.stacks[f"step-{STEP:08d}-rank-{max(rank, 0)}.txt"]
    assert "the process is stopped" in culprit if how == "stop" else " in feeder\n" in culprit
    assert ended.code == (75 if launcher == "python" and how == "sleep" else ended.code) != 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "how", "rank", "kind"),
    [
        ("deepspeed", "kill", 1, "lost_rank"),
        ("torchrun", "kill", 0, "lost_rank"),
        ("torchrun", "exit", 1, "lost_rank"),
        ("deepspeed", "exit", -1, "lost_rank"),  # whose exit code is 0
        ("python", "kill", 0, "lost_rank"),
        ("torchrun", "raise", 1, "task"),
        ("deepspeed", "raise", 0, "task"),
    ],
)
def test_a_rank_that_ends(tmp_path: Path, launcher: str, how: str, rank: int, kind: str) -> None:
    """The culprit is named, whatever the others meet, and whatever the launcher's exit code is."""
    ended = run(tmp_path, launcher, how, rank, stage=2)
    outcome = ended.outcome
    assert (outcome.kind, outcome.step, outcome.phase) == (kind, STEP, "forward"), outcome
    assert outcome.rank in ((0, 1) if rank == -1 else (rank,))
    assert ended.told is not None and ended.told.kind == kind
    if kind == "lost_rank":
        assert outcome.code == 75
        # By its watchdog, or by the other rank, whichever is first.
        place = f"in step {STEP}, phase forward"
        told = [line for line in ended.log.splitlines() if place in line]
        assert any(f"rank {outcome.rank} on " in line for line in told), ended.log
    else:
        assert outcome.reason == "KeyError: 'speaker'"
