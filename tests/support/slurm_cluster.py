"""A Slurm cluster on this machine, for as long as tests need it: munge, a controller, two nodes."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from harness.distributed import free_port
from tests.support.helpers import ROOT

PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "salloc", "srun", "scancel", "scontrol")
NODES = ("127.0.0.1", "127.0.0.2")
"""Nodes are found by their names, so these are addresses; a port distinguishes the daemons."""
CRED_EXPIRE = 5
"""Seconds: a requeued job waits for one more. Slurm's default is 120, also for less than 5."""
CONFIG = """
ClusterName=test
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire={cred_expire}
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/%n.log
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0
PartitionName=main Nodes=ALL Default=YES State=UP
"""


def why_not() -> str:
    """Why a cluster cannot be made on this machine; empty if it can."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "the daemons of Slurm need root"


class Cluster:
    """Its nodes have 2 CPUs each, whatever the machine has."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.environment = {
            "HOME": os.environ.get("HOME", "/root"),
            "PATH": PATH,
            "PYTHONPATH": str(ROOT),
            "SLURM_CONF": str(directory / "slurm.conf"),
        }

    def run(self, *words: str | Path) -> str:
        """What a user's command prints, in the root of the repository.

        Raises CalledProcessError if it fails.
        """
        return subprocess.run(
            [str(word) for word in words],
            env=self.environment,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            timeout=60,
            check=True,
        ).stdout

    def job(self, job: str) -> dict[str, str]:
        """Slurm's record of a job: JobState, ExitCode, Restarts and so on."""
        line = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(word.split("=", 1) for word in line.split() if "=" in word)

    def processes(self) -> list[psutil.Process]:
        """The daemons, and all processes of jobs; without the step daemons (slurmstepd)."""
        found = []
        for process in psutil.process_iter(["environ"]):
            environ = process.info["environ"] or {}
            if environ.get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                found.append(process)
        return found

    def end(self) -> None:
        """Ends the jobs, with their step daemons, and then the other daemons."""
        with contextlib.suppress(subprocess.SubprocessError):
            self.run("scancel", "--user=root")
            self.run("scancel", "--user=root", "--signal=KILL", "--full")
            deadline = time.monotonic() + 20
            while self.run("squeue", "--noheader") and time.monotonic() < deadline:
                time.sleep(0.2)
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@contextlib.contextmanager
def cluster(directory: Path) -> Iterator[Cluster]:
    """A cluster with all of its files in `directory`; all of its processes are ended afterwards."""
    ours = Cluster(directory)
    (directory / "munge.key").write_bytes(secrets.token_bytes(128))
    (directory / "munge.key").chmod(0o600)
    (directory / "state").mkdir()
    config = CONFIG.format(
        host=socket.gethostname(),
        port=free_port(),
        directory=directory,
        first_job=free_port(),  # a job's port is made of its number: other tests' jobs need others
        cred_expire=CRED_EXPIRE,
    )
    for node in NODES:
        config += f"NodeName={node} NodeHostname={socket.gethostname()} CPUs=2 Port={free_port()}\n"
    (directory / "slurm.conf").write_text(config)
    munge = [f"--{file}-file={directory}/munge.{file}" for file in ("key", "pid", "log", "seed")]
    daemons = [
        ["munged", "--foreground", "--force", f"--socket={directory}/munge.socket", *munge],
        ["slurmctld", "-D"],
        *(["slurmd", "-D", "-N", node] for node in NODES),
    ]
    with (directory / "daemons.log").open("w") as log:
        processes = [
            subprocess.Popen(
                daemon, env=ours.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
            for daemon in daemons
        ]
        try:
            yield ours
        finally:
            ours.end()
            for process in processes:
                process.wait(timeout=20)
