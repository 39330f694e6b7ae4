"""Two nodes: every launcher starts on them, and a lost cable or node ends the run, which resumes.

The nodes are namespaces of this machine, each with its own sshd: `tests/support/nodes.py`.
"""

import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from harness.distributed import network
from harness.distributed.network import bounded, choose_interface
from harness.errors import LostRank
from harness.io import load
from tests.support.helpers import ROOT, assert_equal
from tests.support.jobs import log_of, steps_of, until, written_config
from tests.support.nodes import Node, Pair, environment, two_nodes, why_not

pytestmark = pytest.mark.timeout(400)

TIMEOUT_S = 20
ENDLESS = ["--run.steps=1000000", "--trainer.save_every=5", "--data.workers=1"]
AS_ROOT = ["env", "OMPI_ALLOW_RUN_AS_ROOT=1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"]


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(bool(why_not(program)), reason=why_not(program))


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    (tmp_path / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
    with two_nodes(tmp_path / "nodes") as nodes:
        yield nodes


def start(
    node: Node, directory: Path, launcher: Sequence[str | Path], *words: str
) -> subprocess.Popen[str]:
    """Starts the tiny task by a launcher's command on a node; its output is a file."""
    config = ["--config", written_config(directory), f"--run.timeout_s={TIMEOUT_S}"]
    with (directory / f"{node.name}.output").open("w") as output:
        return node.popen(
            ROOT,
            *launcher,
            "launch/train.py",
            *config,
            *words,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )


def over_pdsh(directory: Path, *options: str) -> list[str | Path]:
    return ["deepspeed", "--hostfile", directory / "hostfile", *options]


def trains_on(directory: Path, job: subprocess.Popen[str], steps: int) -> None:
    """Waits until a run has taken that many more steps."""
    metrics = directory / "runs/tiny/metrics.jsonl"
    until(metrics.exists, job)
    goal = max(steps_of(directory), default=0) + steps
    until(lambda: max(steps_of(directory), default=0) >= goal, job)


def ended(job: subprocess.Popen[str], *nodes: Node) -> int:
    """The exit code of a launcher, once it has ended and nothing of the run is left on nodes."""
    code = job.wait(timeout=90)
    until(lambda: not any(node.processes() for node in nodes))
    return code


def losses_in(directory: Path) -> list[str]:
    """Who logs that a rank was lost: "rank 1 ERROR node2"."""
    pattern = r"(rank . ERROR \S+) has lost rank \d on node\d: .+ run\.timeout_s = 20 s"
    return sorted(re.findall(pattern, log_of(directory)))


@needs("pdsh")
@pytest.mark.slow
def test_after_a_cut_cable_and_a_lost_node_the_run_resumes(pair: Pair, tmp_path: Path) -> None:
    """Twice on both nodes, then on the one that is left."""
    job = start(pair.first, tmp_path, over_pdsh(tmp_path), *ENDLESS)
    trains_on(tmp_path, job, 12)
    pair.cut()
    assert ended(job, pair.first, pair.second) != 0
    assert losses_in(tmp_path) == ["rank 0 ERROR node1", "rank 1 ERROR node2"]
    assert (
        "node1: error: node1 has lost rank 1 on node2: " in (tmp_path / "node1.output").read_text()
    )

    pair.reconnect()
    job = start(pair.first, tmp_path, over_pdsh(tmp_path), *ENDLESS)
    until(lambda: "resumed from" in log_of(tmp_path), job)
    assert "step 0 of" not in log_of(tmp_path).rpartition("resumed from")[2]
    trains_on(tmp_path, job, 12)
    pair.second.kill()
    assert ended(job, pair.first) != 0
    assert losses_in(tmp_path) == ["rank 0 ERROR node1"] * 2 + ["rank 1 ERROR node2"]
    assert " [10.0.0.2]:" in log_of(tmp_path)

    steps = max(steps_of(tmp_path)) + 3
    alone = over_pdsh(tmp_path, "--include", "node1")
    job = start(pair.first, tmp_path, alone, f"--run.steps={steps}")
    assert ended(job, pair.first) == 0
    assert f"of {steps} on 1 rank (cpu), rank 0 on node1" in log_of(tmp_path)
    assert steps_of(tmp_path) == list(range(1, steps + 1))


@needs("pdsh")
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_deepspeed_is_stopped(pair: Pair, tmp_path: Path, number: signal.Signals) -> None:
    """By Ctrl-C, which every process in the foreground receives, or by one SIGTERM."""
    job = start(pair.first, tmp_path, over_pdsh(tmp_path), *ENDLESS)
    trains_on(tmp_path, job, 7)
    (command,) = [p for p in pair.first.processes() if p.name() == "deepspeed"]
    others = command.children(recursive=True) if number == signal.SIGINT else []
    for process in [command, *others]:
        with suppress(psutil.NoSuchProcess):  # one that has ended by itself, or by another's end
            process.send_signal(number)
    assert ended(job, pair.first, pair.second) != 0
    last = max(steps_of(tmp_path))
    assert f"saved {tmp_path}/runs/tiny/checkpoints/step-{last:08d}\n" in log_of(tmp_path)
    assert "SIGTERM: done: ending the run" in log_of(tmp_path)


@needs("pdsh")
@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["no_ssh", "torchrun", "c10d"])
def test_a_launcher_started_on_each_node(pair: Pair, tmp_path: Path, launcher: str) -> None:
    """With rank 0's node named as it names itself: by a loopback address."""
    jobs = []
    for rank, node in enumerate((pair.first, pair.second)):
        here = ["--node_rank", str(rank), "--master_addr", "node1"]
        torchrun = ["torchrun", "--nnodes=2", "--nproc_per_node=1"]
        command = {
            "no_ssh": [*over_pdsh(tmp_path), "--no_ssh", *here],
            "torchrun": [*torchrun, *here],
            "c10d": [*torchrun, "--rdzv_backend=c10d", "--rdzv_endpoint=node1:29500"],
        }[launcher]
        jobs.append(start(node, tmp_path, command))
    assert [job.wait(timeout=200) for job in jobs] == [0, 0], (
        tmp_path / "node1.output"
    ).read_text()
    assert "step 0 of 4 on 2 ranks (cpu), rank 0 on node" in log_of(tmp_path)


@needs("mpirun")
@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["mpirun", "deepspeed"])
def test_open_mpi_over_ssh(pair: Pair, tmp_path: Path, launcher: str) -> None:
    mpirun = ["mpirun", "-np", "2", "--hostfile", tmp_path / "hostfile", "-x", "PYTHONPATH"]
    command = {
        "mpirun": [*mpirun, "-x", "MASTER_ADDR=node1", sys.executable],
        "deepspeed": over_pdsh(
            tmp_path, "--launcher", "openmpi", "--launcher_args", "-x MASTER_ADDR=node1"
        ),
    }[launcher]
    job = start(pair.first, tmp_path, [*AS_ROOT, *command])
    assert job.wait(timeout=200) == 0, (tmp_path / "node1.output").read_text()
    assert "step 0 of 4 on 2 ranks (cpu), rank 0 on node1" in log_of(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed")
def test_open_mpi_on_one_machine(tmp_path: Path) -> None:
    mpirun = [*AS_ROOT, "mpirun", "-np", "2", "--oversubscribe", sys.executable]
    words = ["launch/train.py", "--config", str(written_config(tmp_path))]
    done = subprocess.run(
        [*mpirun, *words], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert "step 0 of 4 on 2 ranks (cpu)" in log_of(tmp_path)
    assert steps_of(tmp_path) == [1, 2, 3, 4]


def test_which_interface() -> None:
    def chosen(**environ: str) -> str | None:
        choose_interface(environ)
        return environ.get("GLOO_SOCKET_IFNAME")

    assert chosen() is chosen(MASTER_ADDR="localhost") is chosen(MASTER_ADDR="127.0.0.1") is None
    assert chosen(MASTER_ADDR="192.0.2.7", GLOO_SOCKET_IFNAME="ib0") == "ib0"
    for name, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            if address.family.name == "AF_INET" and not address.address.startswith("127."):
                assert chosen(MASTER_ADDR=address.address) == name


def join_for_ever(output: Path) -> None:
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 2)
    network.SECONDS_TO_A_WORD = 0.05
    with bounded(0.3, "joining"):
        os.read(os.pipe()[0], 1)


def test_what_has_no_timeout_says_so_and_ends_the_process(tmp_path: Path) -> None:
    output = tmp_path / "output"
    with bounded(30, "nothing"):
        process = multiprocessing.get_context("fork").Process(target=join_for_ever, args=(output,))
        process.start()
    process.join(timeout=30)
    assert process.exitcode == LostRank.code
    first, *_, last = output.read_text().splitlines()
    assert first.startswith("joining: not done for 0 s: a rank has not started")
    assert last == "error: joining: not done within 0.3 s"


# Each node its own disk, of which a neighbour has copies


def on_own_disk(node: Node, directory: Path) -> None:
    """Gives a node an empty disk for the run directory, which nobody else sees."""
    runs = directory / "runs"
    runs.mkdir(exist_ok=True)
    subprocess.run(node.command(Path("/"), "umount", "-l", runs), capture_output=True)
    node.run("mount", "-t", "tmpfs", "tmpfs", str(runs))


def start_on(nodes: Sequence[Node], directory: Path, *words: str) -> list["subprocess.Popen[str]"]:
    """Starts a rank of the run on each of these nodes, without a launcher."""
    words = ("--trainer.save_every=5", "--checkpoint.replicas=1", *words)
    world = [f"WORLD_SIZE={len(nodes)}", "LOCAL_RANK=0", "LOCAL_WORLD_SIZE=1"]
    world += ["MASTER_ADDR=node1", "MASTER_PORT=29500"]
    return [
        start(node, directory, ["env", *world, f"RANK={rank}", sys.executable], *words)
        for rank, node in enumerate(nodes)
    ]


def log_on(node: Node, directory: Path) -> str:
    words = node.command(Path("/"), "cat", directory / "runs/tiny/log.txt")
    return subprocess.run(words, capture_output=True, text=True).stdout


def completed(jobs: Sequence["subprocess.Popen[str]"], node: Node, directory: Path) -> str:
    """The log of a run, once it is complete. Its disk is copied to `results`."""
    codes = [job.wait(timeout=600) for job in jobs]
    assert set(codes) == {0}, (directory / f"{node.name}.output").read_text()
    shutil.rmtree(directory / "results", ignore_errors=True)
    node.run("cp", "-r", str(directory / "runs/tiny"), str(directory / "results"))
    return log_on(node, directory)


@needs("env")
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_node_is_destroyed_with_its_disk(pair: Pair, tmp_path: Path) -> None:
    """The run goes on with a fresh one, to the bit; and on the one that is left."""
    nodes = (pair.first, pair.second)
    for node in nodes:
        on_own_disk(node, tmp_path)
    jobs = start_on(nodes, tmp_path, "--run.steps=1000000")
    until(lambda: log_on(pair.first, tmp_path).count("is safe on two nodes") > 1, jobs[0], 600)
    for process in pair.second.processes():
        process.kill()
    safe = re.findall(r"step-0*(\d+) is safe on two nodes", log_on(pair.first, tmp_path))
    on_own_disk(pair.second, tmp_path)
    assert jobs[0].wait(timeout=200) != 0
    pair.first.run("cp", "-r", str(tmp_path / "runs/tiny"), str(tmp_path / "left"))

    steps = f"--run.steps={int(safe[-1]) + 50}"
    log = completed(start_on(nodes, tmp_path, steps), pair.first, tmp_path)
    resumed = re.findall(r"resumed from .*/step-0*(\d+)\n", log)
    assert int(resumed[-1]) >= int(safe[-1])
    weights = load(tmp_path / f"results/exports/step-{int(safe[-1]) + 50:08d}/net.sft")

    on_own_disk(pair.first, tmp_path)
    pair.first.run("cp", "-r", str(tmp_path / "left"), str(tmp_path / "runs/tiny"))
    log = completed(start_on(nodes[:1], tmp_path, steps), pair.first, tmp_path)
    assert re.findall(r"resumed from .*/step-0*(\d+)\n", log)[-1] == resumed[-1]
    assert "on 1 rank (cpu), rank 0 on node1" in log

    for node in nodes:
        on_own_disk(node, tmp_path)
    completed(start_on(nodes, tmp_path, steps), pair.first, tmp_path)
    reference = tmp_path / f"results/exports/step-{int(safe[-1]) + 50:08d}/net.sft"
    assert_equal(weights, load(reference))
