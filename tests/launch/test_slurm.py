"""Jobs of a real Slurm: saved and requeued before their time limit, commanded, cancelled."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.support.helpers import ROOT
from tests.support.jobs import answers, ctl, log_of, steps_of, until, written_config
from tests.support.slurm_cluster import NODES, Cluster, cluster, why_not

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]

PRINT_RANK = """
import json, os
from harness.launcher.environment import set_rank_variables
set_rank_variables()
keys = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
print(json.dumps({key: os.environ[key] for key in (*keys, "SLURMD_NODENAME")}))
"""

AWAY = """#!/bin/bash
# Stands in for Slurm's commands; the controller is away at first, and answers the second try.
name=${0##*/}
echo "$name" >>calls
tries=$(grep --count "^$name$" calls)
case $name in
srun)
    trap 'signalled=yes' TERM
    echo $$ >ranks
    until [[ $signalled && -e saved ]]; do /bin/sleep 0.1; kill -0 $PPID || exit; done
    exit 143
    ;;
sleep) ;;
*) ((tries > 1)) || exit 1 ;;&
scancel) kill -TERM "$(cat ranks)" ;;
squeue) echo RUNNING ;;
esac
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm")) as ours:
        until(lambda: is_up(ours))
        yield ours


def is_up(slurm: Cluster) -> bool:
    try:
        return slurm.run("sinfo", "--noheader", "--format=%D %T").split() == ["2", "idle"]
    except subprocess.CalledProcessError:  # no controller yet
        return False


@contextmanager
def job(slurm: Cluster, directory: Path, *words: str, stdin: str = "") -> Iterator[str]:
    """The number of a job that trains the tiny task below `directory`; cancelled at the end."""
    (directory / "stdin").write_text(stdin)
    files = [f"--output={directory}/output", f"--input={directory}/stdin"]
    config = ["--config", str(written_config(directory))]
    script = "launch/slurm/train.sbatch"
    number = slurm.run("sbatch", "--parsable", *files, script, *config, *words).strip()
    try:
        yield number
    finally:
        slurm.run("scancel", number)
        until(lambda: not runs(slurm, number))


def runs(slurm: Cluster, number: str) -> bool:
    """Whether anything of a job is left, its script included."""
    left = [process.info["environ"].get("SLURM_JOB_ID") for process in slurm.processes()]
    return number in left


def is_training(directory: Path) -> bool:
    """Whether it takes commands, and has taken a step."""
    return answers(directory) and bool(steps_of(directory))


@pytest.mark.slow
def test_a_job_near_its_time_limit_saves_and_resumes_by_itself(
    slurm: Cluster, tmp_path: Path
) -> None:
    """It also takes standard input and `harness ctl`; once cancelled, it is not requeued again."""
    stdin = "lr 1e-4\nsave as typed\n"
    with job(slurm, tmp_path, "--run.steps=1000000", stdin=stdin) as number:
        until(lambda: is_training(tmp_path) and "save as typed: done" in log_of(tmp_path))
        assert "on 2 ranks" in log_of(tmp_path)
        assert "net: lr held at 0.0001" in ctl(tmp_path, "status")[1]
        slurm.run("scancel", "--signal=USR1", "--batch", number)
        until(lambda: slurm.job(number)["Restarts"] == "1")
        before = steps_of(tmp_path)[-1]
        saved = f"{tmp_path}/runs/tiny/checkpoints/step-{before:08d}"
        assert re.search(f"SIGTERM: done: ending the run\n.* saved {saved}\n", log_of(tmp_path))

        until(lambda: f"resumed from {saved}" in log_of(tmp_path))
        until(lambda: answers(tmp_path) and steps_of(tmp_path)[-1] > before)
        slurm.run("scancel", number)
        until(lambda: not runs(slurm, number))
        until(lambda: slurm.job(number)["JobState"] == "CANCELLED")
        assert slurm.job(number)["Restarts"] == "1"
    steps = steps_of(tmp_path)
    assert steps == list(range(1, len(steps) + 1))
    last = f"{tmp_path}/runs/tiny/checkpoints/step-{steps[-1]:08d}"
    assert f"saved {last}\n" in log_of(tmp_path)


def is_rank(process: psutil.Process, number: str, rank: str) -> bool:
    """Whether it is that rank of a job."""
    environ = process.info["environ"] or {}
    is_ours = environ.get("SLURM_JOB_ID") == number and environ.get("SLURM_PROCID") == rank
    return is_ours and process.cmdline()[1:2] == ["launch/train.py"]


@pytest.mark.slow
def test_a_job_that_has_lost_a_rank_resumes_by_itself(slurm: Cluster, tmp_path: Path) -> None:
    with job(slurm, tmp_path, "--run.steps=1000000") as number:
        until(lambda: is_training(tmp_path))
        assert ctl(tmp_path, "save")[0] == 0
        (rank,) = [p for p in slurm.processes() if is_rank(p, number, "1")]
        rank.kill()
        until(lambda: slurm.job(number)["Restarts"] == "1")
        until(lambda: "resumed from " in log_of(tmp_path))
        until(lambda: is_training(tmp_path))
        assert ctl(tmp_path, "quit")[0] == 0
        until(lambda: slurm.job(number)["JobState"] == "COMPLETED")
        assert slurm.job(number)["ExitCode"] == "0:0" and slurm.job(number)["Restarts"] == "1"


@pytest.mark.slow
def test_a_job_with_a_config_error_is_not_requeued(slurm: Cluster, tmp_path: Path) -> None:
    with job(slurm, tmp_path, "--run.stesp=1") as number:
        until(lambda: slurm.job(number)["JobState"] == "FAILED")
        assert slurm.job(number)["ExitCode"] == "2:0"
    output = (tmp_path / "output").read_text()
    assert output.startswith("error: config "), output  # and later rank 1, which srun does not end
    assert "run.stesp (command line): unknown key" in output.partition("rank 1")[0], output


ENDED = """#!/bin/bash
# Stands in for Slurm's commands: rank 1 is killed, and the run reports an end with $CODE, or none.
echo "${0##*/}" >>calls
case ${0##*/} in
srun)
    json='{\\n  "kind": "error",\\n  "code": %s,\\n  "step": 75\\n}\\n'
    [[ -z $CODE ]] || printf "$json" "$CODE" >"$HARNESS_OUTCOME"
    exit 137
    ;;
squeue) echo "$STATE" ;;
esac
"""


@pytest.mark.parametrize(
    ("code", "state", "restarts", "exits_with", "is_requeued"),
    [
        ("75", "RUNNING", "", 75, True),
        ("75", "RUNNING", "9", 75, True),
        ("75", "RUNNING", "10", 75, False),
        ("75", "COMPLETING", "", 75, False),
        ("143", "RUNNING", "10", 143, True),
        ("0", "RUNNING", "", 0, False),
        ("1", "RUNNING", "", 1, False),
        ("2", "RUNNING", "", 2, False),
        ("", "RUNNING", "", 137, False),
    ],
)
def test_a_job_is_requeued_by_what_the_run_reports(
    tmp_path: Path, code: str, state: str, restarts: str, exits_with: int, is_requeued: bool
) -> None:
    """Not by the exit code of srun, which is the highest of all ranks."""
    for name in ("srun", "squeue", "scontrol"):
        (tmp_path / name).write_text(ENDED)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    job = {"PATH": path, "SLURM_JOB_ID": "1", "SLURM_RESTART_COUNT": restarts}
    script = ["bash", ROOT / "launch/slurm/train.sbatch"]
    done = subprocess.run(
        script, cwd=tmp_path, env=job | {"CODE": code, "STATE": state}, check=False, timeout=60
    )
    assert done.returncode == exits_with
    assert ("scontrol" in (tmp_path / "calls").read_text()) == is_requeued
    assert not list(tmp_path.glob("*.json"))


def test_an_absent_controller_costs_no_requeue(tmp_path: Path) -> None:
    """A USR1 that reached the ranks is not sent again; one that did not is."""
    for name in ("srun", "scancel", "squeue", "scontrol", "sleep"):
        (tmp_path / name).write_text(AWAY)
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"
    with subprocess.Popen(
        ["bash", ROOT / "launch/slurm/train.sbatch"],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "1"},
    ) as script:

        def times_signalled() -> int:
            script.send_signal(signal.SIGUSR1)
            return calls.read_text().count("scancel")

        try:
            until((tmp_path / "ranks").exists, script)
            until(lambda: times_signalled() == 2, script)
            times_signalled()
            (tmp_path / "saved").touch()
            assert script.wait(timeout=60) == 143
        finally:
            script.kill()
    again = ["squeue", "sleep", "squeue", "scontrol", "sleep", "scontrol"]
    assert calls.read_text().split() == ["srun", "scancel", "scancel", *again]


@pytest.mark.parametrize(
    "words",
    [
        "srun --nodes=2 --ntasks=3",
        "srun --ntasks=4 --distribution=cyclic",
        "salloc --nodes=2 --ntasks=4 srun --nodes=1 --relative=1 --ntasks=2",
        f"salloc -n2 -w {NODES[1]} : -n1 -w {NODES[0]} srun --het-group=0,1",
        f"salloc -n1 -w {NODES[1]} : -n2 -w {NODES[0]} srun --het-group=1",
    ],
)
def test_ranks_find_each_other(slurm: Cluster, words: str) -> None:
    printed = slurm.run(*words.split(), "python", "-c", PRINT_RANK).splitlines()
    ranks = sorted(map(json.loads, printed), key=lambda rank: int(rank["RANK"]))
    nodes = [rank["SLURMD_NODENAME"] for rank in ranks]
    assert len({rank["MASTER_PORT"] for rank in ranks}) == 1
    for number, rank in enumerate(ranks):
        assert rank["RANK"] == str(number) and rank["WORLD_SIZE"] == str(len(ranks))
        assert rank["MASTER_ADDR"] == nodes[0]
        assert rank["LOCAL_RANK"] == str(nodes[:number].count(nodes[number]))
        assert rank["LOCAL_WORLD_SIZE"] == str(nodes.count(nodes[number]))


def test_the_host_of_rank_0_may_have_to_be_set(slurm: Cluster, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text(f"{NODES[1]}\n{NODES[0]}\n")
    words = ["srun", "--distribution=arbitrary", f"--nodelist={hosts}", "--ntasks=2"]
    with pytest.raises(subprocess.CalledProcessError):
        slurm.run(*words, "python", "-c", PRINT_RANK)
    printed = slurm.run("env", f"MASTER_ADDR={NODES[1]}", *words, "python", "-c", PRINT_RANK)
    (first,) = [rank for rank in map(json.loads, printed.splitlines()) if rank["RANK"] == "0"]
    assert first["SLURMD_NODENAME"] == first["MASTER_ADDR"] == NODES[1]
