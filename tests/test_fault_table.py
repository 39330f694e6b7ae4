"""Each fault, in each phase of a run, at each ZeRO stage, under each launcher: how the run ends.

python -m tests.test_fault_table     prints the table of docs/reliability.md
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pytest

from tests.support.forked import run_forked
from tests.support.helpers import ROOT
from tests.support.jobs import log_of, popen, ranks_of, written_config

LIMIT_S = 100.0
BOUND_S = 15
"""Of a phase: then the watchdog finds that a rank hangs."""


@dataclass(frozen=True)
class Row:
    """One fault, of the last rank or of all."""

    kind: str
    phase: str
    zero: int
    launcher: str = "forked"
    """"forked": ranks that nobody ends (tests/support/forked.py)."""
    on_all: bool = False
    workers: int = 0
    ends_as: tuple[str, ...] = ("task", "error")
    """Kinds of the outcome."""
    saved: int | None = None
    """The step that is saved before the end."""

    def __str__(self) -> str:
        where = "all" if self.on_all else "one"
        return f"{self.kind}-{self.phase}-{where}-zero{self.zero}-{self.launcher}-{self.workers}"


@dataclass(frozen=True)
class Result:
    """How a run has ended."""

    code: str
    """The launcher's, or of ranks without one by rank."""
    seconds: float
    """From the fault to the end of the last process."""
    outcome: dict
    terminal: str
    log: str
    saved: list[int]


QUICK = [
    Row("raise", "forward", 3),
    Row("kill", "backward", 2, ends_as=("lost_rank",)),
]
SLOW = [
    Row("raise", "data", 0, on_all=True, workers=1, saved=2),
    *(
        Row("raise", phase, zero)
        for phase in ("forward", "backward", "step")
        for zero in (0, 2, 3)
        if (phase, zero) != ("forward", 3)
    ),
    *(Row("raise", "forward", zero, on_all=True, saved=2) for zero in (0, 2, 3)),
    Row("raise", "data", 0, workers=2),
    Row("raise", "data", 3, workers=2),
    Row("raise", "evaluation", 0, saved=4),
    Row("raise", "evaluation", 2, saved=4),
    Row("raise", "evaluation", 3),
    Row("raise", "evaluation", 2, on_all=True, saved=4),
    Row("raise", "export", 2, ends_as=("task", "error")),
    Row("raise", "save", 2, ends_as=("checkpoint",)),
    Row("full disk", "save", 2, ends_as=("checkpoint",)),
    Row("exit", "forward", 2),
    Row("oom", "forward", 2, ends_as=("oom",)),
    Row("os._exit", "forward", 2, ends_as=("lost_rank",)),
    Row("kill", "forward", 0, ends_as=("lost_rank",)),
    Row("kill", "forward", 3, ends_as=("lost_rank",)),
    Row("kill", "data", 2, workers=2, ends_as=("error", "task")),
    Row("collective", "forward", 0, ends_as=("lost_rank", "hang", "error")),
    Row("hang", "forward", 2, ends_as=("hang", "lost_rank")),
    Row("hang", "data", 2, workers=2, ends_as=("hang", "lost_rank")),
    Row("stop", "forward", 3, ends_as=("hang", "lost_rank")),
    Row("raise", "forward", 2, "deepspeed"),
    Row("raise", "forward", 3, "torchrun"),
    Row("kill", "forward", 3, "torchrun", ends_as=("lost_rank",)),
    Row("raise", "data", 2, "python", on_all=True, workers=2, saved=2),
]
STEP = 3
KEYS = ("forward", "backward", "step", "data", "evaluation")


def _launch(launcher: str, directory: Path, words: list[str], output: Path) -> str:
    """Runs a job to its end, its launcher's and that of all ranks; the exit code."""
    if launcher == "forked":
        words = ["--config", str(written_config(directory)), *words]
        return ", ".join(map(str, run_forked(2, words, output, LIMIT_S)))
    with (
        output.open("w") as file,
        popen(
            launcher,
            directory,
            *words,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            code = process.wait(LIMIT_S)
            while ranks_of(directory):
                time.sleep(0.1)
        finally:
            for left in ranks_of(directory):
                left.kill()
            process.kill()
    return str(code)


def result_of(row: Row, directory: Path) -> Result:
    """Runs the job in an empty directory, until nothing of it is left."""
    rank = "" if row.on_all else f", rank={0 if row.launcher == 'python' else 1}"
    # Of data, the step is a micro-batch; evaluations, saves and exports come at the end.
    step = {"evaluation": 4, "save": 4, "export": 4}.get(row.phase, STEP)
    words = [
        f"--task.path={ROOT}/tests/tasks/faulty_task.py",
        f"--task.args.fault={{phase='{row.phase}', kind='{row.kind}', step={step}{rank}}}",
        f"--engines.net.ds_config={ROOT}/ds_configs/zero{row.zero}.json",
        f"--data.workers={row.workers}",
        "--data.micro_batch_size=4",
        f"--health.timeouts={{{', '.join(f'{key}={BOUND_S}' for key in KEYS)}}}",
        "--checkpoint.on_error=stop",
        "--run.steps=4",
    ]
    if row.zero == 3:
        persisted = "zero_optimization={stage3_param_persistence_threshold=0}"
        words.append(f"--engines.net.ds_overrides={{{persisted}}}")
    output = directory / "output"
    code = _launch(row.launcher, directory, words, output)
    ended = time.time()
    run = directory / "runs/tiny"
    log = log_of(directory)
    fired = re.search(r"(\S+ \S+) rank \d WARNING fault injected", log)
    assert fired, log
    began = datetime.strptime(fired[1], "%Y-%m-%d %H:%M:%S").astimezone().timestamp()
    saved = [int(path.name[-8:]) for path in (run / "checkpoints").glob("step-????????")]
    outcome = json.loads((run / "ended.json").read_text())
    return Result(code, ended - began, outcome, output.read_text(), log, sorted(saved))


def check(row: Row, result: Result) -> None:
    """What is promised of every row."""
    assert "0" not in result.code.split(", ")
    assert result.outcome["kind"] in row.ends_as, result.outcome
    assert result.saved == ([row.saved] if row.saved else []), result.saved
    if row.kind == "raise" and row.phase != "save":  # whose errors are one line
        for text in (result.log, result.terminal):
            found = re.findall(r"^(?:\[rank\d\]: )?ValueError: injected$", text, re.MULTILINE)
            assert len(found) == 1, text
        assert f"phase {row.phase}" in result.log
    if not row.on_all and row.phase != "save":
        assert result.outcome["rank"] == 1, result.outcome
    if row.ends_as == ("lost_rank",):
        assert "has lost rank 1 on " in result.log


@pytest.mark.parametrize("row", QUICK, ids=str)
def test_the_diagonal(row: Row, tmp_path: Path) -> None:
    check(row, result_of(row, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("row", SLOW, ids=str)
def test_every_fault(row: Row, tmp_path: Path) -> None:
    check(row, result_of(row, tmp_path))


HEADER = "fault|in phase|of|ZeRO|launcher|outcome|code|seconds|saved"


def lines(chosen: str) -> Iterator[str]:
    """The table's rows whose name contains a text, a line as soon as it is known."""
    columns = HEADER.split("|")
    yield "| " + " | ".join(columns) + " |"
    yield "|---" * len(columns) + "|"
    for row in (row for row in (*QUICK, *SLOW) if chosen in str(row)):
        with tempfile.TemporaryDirectory() as directory:
            try:
                result = result_of(row, Path(directory))
                check(row, result)
            except Exception as error:
                sys.stderr.write(f"{row}: {str(error)[-3000:]}\n")
                continue
        where = "all ranks" if row.on_all else "one rank"
        where += "' worker" if row.workers and row.on_all else "'s worker" if row.workers else ""
        phase, kind = row.phase, row.kind
        place = result.outcome["kind"], result.code, f"{result.seconds:.0f}"
        saved = ", ".join(f"step {step}" for step in result.saved) or "-"
        cells = [kind, phase, where, row.zero, row.launcher, *place, saved]
        yield "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    for line in lines(*sys.argv[1:] or [""]):
        print(line, flush=True)  # noqa: T201
