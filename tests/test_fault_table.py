"""Each fault, in each phase of a run, at each ZeRO stage, under each launcher: how the run ends.

python -m tests.test_fault_table     prints the table of docs/reliability.md
"""

import json
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

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
    rank: int = -1
    """Which one, if it is not of all; from the end if negative."""
    workers: int = 0
    ends_as: tuple[str, ...] = ("task",)
    """Kinds of the outcome."""
    saved: int | None = None
    """The step that is saved before the end."""
    ranks: int = 2
    dtype: str = "fp32"
    steps: int = 4
    step: int | None = 3
    """When it happens; None: in every step."""
    command: str = ""
    """What is typed at the start."""
    says: str = ""
    """What the log says of it, if the run goes on."""

    @property
    def ends_well(self) -> bool:
        return self.ends_as == ("complete",)

    @property
    def culprit(self) -> int:
        return self.rank % self.ranks

    def __str__(self) -> str:
        where = "all" if self.on_all else f"rank{self.culprit}"
        layout = f"zero{self.zero}-{self.dtype}-{self.ranks}-{self.launcher}-{self.workers}"
        return f"{self.kind}-{self.phase}-{where}-{layout}"


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


COMPLETE: dict[str, Any] = {"ends_as": ("complete",)}
LONG: dict[str, Any] = COMPLETE | {"steps": 100, "step": None}
SKIPPED = "skipped, as its gradients are not finite (1 so far): the loss of rank {rank}"
QUICK = [
    Row("raise", "forward", 3, rank=0),
    Row("kill", "backward", 2, ends_as=("lost_rank",)),
]
SLOW = [
    Row("raise", "data", 0, on_all=True, workers=1, saved=2),
    *(Row("raise", phase, zero) for phase in ("forward", "backward", "step") for zero in (0, 2, 3)),
    Row("raise", "forward", 2, rank=0),
    Row("raise", "forward", 3, rank=0, ranks=3),
    *(Row("raise", "forward", zero, on_all=True, saved=2) for zero in (0, 2, 3)),
    *(Row("raise", "forward", zero, ranks=3) for zero in (0, 2, 3)),
    *(Row("raise", "forward", zero, dtype="bf16") for zero in (0, 2, 3)),
    Row("raise", "collate", 2),
    Row("raise", "collate", 2, on_all=True, saved=2),
    Row("raise", "command", 2, command="eval", steps=100, step=None),
    Row("raise", "command", 3, command="lr 0.005", says="rank 1: 'lr 0.005':", **LONG),
    Row("raise", "data", 0, workers=2),
    Row("raise", "data", 3, workers=2),
    Row("raise", "evaluation", 0, saved=4),
    Row("raise", "evaluation", 2, saved=4),
    Row("raise", "evaluation", 3),
    Row("raise", "evaluation", 2, on_all=True, saved=4),
    Row("raise", "export", 2),
    Row("raise", "save", 2, ends_as=("checkpoint",)),
    Row("full disk", "save", 2, ends_as=("checkpoint",)),
    Row("exit", "forward", 2),
    Row("oom", "forward", 2, ends_as=("oom",)),
    Row("os._exit", "forward", 2, ends_as=("lost_rank",)),
    Row("kill", "forward", 0, ends_as=("lost_rank",)),
    Row("kill", "forward", 3, ends_as=("lost_rank",)),
    Row("kill", "data", 2, workers=2, ends_as=("error",)),
    Row("collective", "forward", 0, ends_as=("lost_rank", "hang", "error")),
    Row("hang", "forward", 2, ends_as=("hang", "lost_rank")),
    Row("hang", "data", 2, workers=2, ends_as=("hang", "lost_rank")),
    Row("stop", "forward", 3, ends_as=("hang", "lost_rank")),
    Row("io error", "data", 2, workers=2, ends_as=("error",)),
    Row("io error", "save", 2, ends_as=("checkpoint",)),
    Row("kill", "forward", 3, ranks=3, ends_as=("lost_rank",)),
    Row("kill", "forward", 2, dtype="bf16", ends_as=("lost_rank",)),
    *(Row("nan", "forward", zero, says=SKIPPED, **COMPLETE) for zero in (0, 2, 3)),
    Row("nan", "forward", 2, dtype="bf16", says=SKIPPED, **COMPLETE),
    Row("nan", "forward", 3, ranks=3, says=SKIPPED, **COMPLETE),
    Row("inf", "forward", 2, says=SKIPPED, **COMPLETE),
    Row("spike", "forward", 2, **COMPLETE, steps=80, step=70, says="a spike: "),
    Row(
        "slow", "forward", 2, **COMPLETE, steps=13, step=None, says="rank {rank} on {host} is slow"
    ),
    Row("raise", "forward", 2, "deepspeed"),
    Row("raise", "forward", 3, "torchrun"),
    Row("kill", "forward", 3, "torchrun", ends_as=("lost_rank",)),
    Row("raise", "data", 2, "python", on_all=True, workers=2, saved=2),
]
KEYS = ("forward", "backward", "step", "data", "evaluation")


def _launch(row: Row, directory: Path, words: list[str], output: Path) -> str:
    """Runs a job to its end, its launcher's and that of all ranks; the exit code."""
    if row.launcher == "forked":
        words = ["--config", str(written_config(directory)), *words]
        return ", ".join(map(str, run_forked(row.ranks, words, output, LIMIT_S)))
    with (
        output.open("w") as file,
        popen(
            row.launcher,
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
    # Of data, the step is a micro-batch; evaluations, saves and exports come at the end.
    fault = {"phase": row.phase, "kind": row.kind}
    at = 4 if row.phase in ("evaluation", "save", "export") else row.step
    fault |= {} if at is None else {"step": at}
    fault |= {} if row.on_all else {"rank": 0 if row.launcher == "python" else row.culprit}
    words = [
        f"--task.path={ROOT}/tests/tasks/faulty_task.py",
        f"--task.args.fault={{{', '.join(f'{k}={v!r}' for k, v in fault.items())}}}",
        f"--task.args.command={row.command}",
        f"--engines.net.ds_config={ROOT}/ds_configs/zero{row.zero}.json",
        f"--engines.net.ds_overrides.bf16={{enabled={str(row.dtype == 'bf16').lower()}}}",
        f"--data.workers={row.workers}",
        "--data.micro_batch_size=4",
        f"--health.timeouts={{{', '.join(f'{key}={BOUND_S}' for key in KEYS)}}}",
        "--checkpoint.on_error=stop",
        f"--run.steps={row.steps}",
    ]
    if row.zero == 3:
        words.append(
            "--engines.net.ds_overrides.zero_optimization={stage3_param_persistence_threshold=0}"
        )
    output = directory / "output"
    code = _launch(row, directory, words, output)
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
    assert result.outcome["kind"] in row.ends_as, result.outcome
    if row.ends_well:
        assert set(result.code.split(", ")) == {"0"} and result.saved == [row.steps]
        assert row.says.format(host=socket.gethostname(), rank=row.culprit) in result.log
        return
    assert "0" not in result.code.split(", ")
    assert result.saved == ([row.saved] if row.saved else []), result.saved
    if row.kind == "raise" and row.phase != "save":  # whose errors are one line
        for text in (result.log, result.terminal):
            found = re.findall(r"^(?:\[rank\d\]: )?ValueError: injected$", text, re.MULTILINE)
            assert len(found) == 1, text
        phase = {"collate": "data", "command": "commands"}.get(row.phase, row.phase)
        assert f"phase {phase}" in result.log
        if row.launcher == "forked" and not row.on_all and row.saved is None:
            told = f"rank {row.culprit} on {socket.gethostname()} has failed in step "
            assert result.log.count(told) == row.ranks - 1, "the others do not tell why"
    if not row.on_all and row.phase != "save":
        assert result.outcome["rank"] == row.culprit, result.outcome
    if row.ends_as == ("lost_rank",):
        assert f"has lost rank {row.culprit} on " in result.log


@pytest.mark.parametrize("row", QUICK, ids=str)
def test_the_diagonal(row: Row, tmp_path: Path) -> None:
    check(row, result_of(row, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("row", SLOW, ids=str)
def test_every_fault(row: Row, tmp_path: Path) -> None:
    check(row, result_of(row, tmp_path))


HEADER = "fault|in phase|of|ZeRO|dtype|ranks|launcher|outcome|code|seconds|saved"


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
        where = "all ranks" if row.on_all else "rank 0" if row.culprit == 0 else "one rank"
        where += "' worker" if row.workers and row.on_all else "'s worker" if row.workers else ""
        phase, kind = row.phase, row.kind
        outcome = result.outcome["kind"]
        if row.ends_well:
            said = row.says.partition(",")[0].strip(" :")
            outcome += f': "{said.format(host="node", rank=row.culprit)}"'
        place = outcome, result.code, "-" if row.ends_well else f"{result.seconds:.0f}"
        saved = ", ".join(f"step {step}" for step in result.saved) or "-"
        launcher = "none" if row.launcher == "forked" else row.launcher
        cells = [kind, phase, where, row.zero, row.dtype, row.ranks, launcher, *place, saved]
        yield "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    for line in lines(*sys.argv[1:] or [""]):
        print(line, flush=True)  # noqa: T201
