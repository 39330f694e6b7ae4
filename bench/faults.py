"""How soon a job of two ranks notices that one of them fails, beside NVRx and torchft.

    python -m bench.faults [--ways harness nvrx torchft] [--bound 15]

The same steps of 50 ms with a sum over the ranks, on gloo, and the same fault in rank 1: an
exception, SIGKILL, or a hang, which each of them takes for one after `--bound` seconds. Prints the
seconds from the fault to the end of the last rank (harness under torchrun; NVRx under its launcher,
with a section for each step, and no restart); for torchft, where the other replica goes on, to its
next committed step. For those two:

    pip install torchft nvidia-resiliency-ext
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

ROOT = Path(__file__).parents[1]
FAULTS = ("raise", "kill", "hang")
STEP = 20
CONFIG = """
[run]
dir = "{directory}/runs"
name = "r"
steps = 1000000
[task]
path = "{file}"
[engines.net]
ds_config = "{root}/ds_configs/zero2.json"
optimizer = {{ name = "adamw", lr = 1e-3 }}
[data]
micro_batch_size = 2
[health.timeouts]
data = {bound}
forward = {bound}
backward = {bound}
step = {bound}
[control]
stdin = false
"""


def strike(step: int, rank: int) -> None:
    """The fault, and when it came."""
    time.sleep(0.05)
    directory = Path(os.environ["FAULT_DIR"])
    (directory / f"rank{rank}").write_text(str(os.getpid()))
    if (rank, step) != (1, STEP):
        return
    (directory / "fault").write_text(str(time.time()))
    match os.environ["FAULT"]:
        case "raise":
            raise ValueError("unwell")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case _:
            time.sleep(10_000)


def build(config: object) -> object:
    """The task of harness."""
    import torch

    from harness.task import Task

    steps = iter(range(1_000_000))

    def feeder(engine: torch.nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, dict]:
        strike(next(steps), int(os.environ["RANK"]))
        return engine(batch).square().mean(), {}

    return Task(models={"net": torch.nn.Linear(4, 4)}, train_data=torch.ones(64, 4), feeder=feeder)


def nvrx() -> None:
    """A rank under NVRx's launcher."""
    import torch
    import torch.distributed as dist
    from nvidia_resiliency_ext.fault_tolerance import (  # pyright: ignore[reportMissingImports]
        RankMonitorClient,
    )

    client = RankMonitorClient()
    client.init_workload_monitoring()
    dist.init_process_group("gloo")
    for step in range(1_000_000):
        client.start_section("step")
        strike(step, dist.get_rank())
        dist.all_reduce(torch.ones(4))
        client.end_section("step")


def torchft() -> None:
    """A replica of torchft, of one rank."""
    import torch
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
    from torchft.manager import Manager  # pyright: ignore[reportMissingImports]
    from torchft.process_group import ProcessGroupGloo  # pyright: ignore[reportMissingImports]

    directory, replica = Path(os.environ["FAULT_DIR"]), int(os.environ["REPLICA"])
    limit = timedelta(seconds=float(os.environ["BOUND"]))
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=limit),
        load_state_dict=lambda state: None,
        state_dict=dict,
        min_replica_size=1,
        use_async_quorum=False,
        timeout=limit,
        rank=0,
        world_size=1,
        store_addr="localhost",
        store_port=store.port,
        replica_id=f"replica{replica}",
        init_sync=False,
    )
    together = 0
    while True:
        manager.start_quorum()
        together += manager.num_participants() == 2
        strike(together, replica)
        manager.allreduce(torch.ones(4)).wait()
        if manager.should_commit() and (directory / "fault").exists():
            (directory / "committed").write_text(str(time.time()))
            sys.exit()


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("localhost", 0))
        return bound.getsockname()[1]


@contextmanager
def started(*commands: list[str], **environment: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    with (Path(environment["FAULT_DIR"]) / "output").open("wb") as output:
        jobs = [
            subprocess.Popen(
                command,
                env=os.environ | environment | {"REPLICA": str(number), "OMP_NUM_THREADS": "1"},
                cwd=ROOT,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
            )
            for number, command in enumerate(commands)
        ]
        try:
            yield jobs
        finally:
            for job in jobs:
                with suppress(psutil.Error):
                    for process in psutil.Process(job.pid).children(recursive=True):
                        process.kill()
                job.kill()
                job.wait()


def ended(directory: Path, limit_s: float) -> float:
    """When the last rank has ended."""
    deadline, fault = time.time() + limit_s, directory / "fault"
    while not fault.exists() or any(map(is_running, directory.glob("rank*"))):
        if time.time() > deadline:
            raise TimeoutError(f"a rank is there after {limit_s:g} s")
        time.sleep(0.05)
    return time.time()


def is_running(file: Path) -> bool:
    with suppress(psutil.Error):
        return psutil.Process(int(file.read_text())).status() != "zombie"
    return False


def seconds(way: str, fault: str, bound: float, limit_s: float, directory: Path) -> float:
    """From the fault to the end."""
    environment = {"FAULT": fault, "FAULT_DIR": str(directory), "BOUND": str(bound)}
    python = [sys.executable, str(Path(__file__))]
    if way == "torchft":
        from torchft.coordination import LighthouseServer  # pyright: ignore[reportMissingImports]

        lighthouse = LighthouseServer(bind="[::]:0", min_replicas=1, join_timeout_ms=1000)
        environment["TORCHFT_LIGHTHOUSE"] = lighthouse.address()
        with started(
            [*python, "--as-rank", way], [*python, "--as-rank", way], **environment
        ) as jobs:
            jobs[0].wait(limit_s)
        lighthouse.shutdown()
        end = float((directory / "committed").read_text())
    else:
        if way == "harness":
            config = directory / "config.toml"
            names = {"directory": directory, "file": __file__, "root": ROOT, "bound": bound}
            config.write_text(CONFIG.format(**names))
            launcher = [sys.executable, "-m", "torch.distributed.run"]
            script = ["launch/train.py", "--config", str(config)]
        else:
            launcher = [sys.executable, "-m", "nvidia_resiliency_ext.fault_tolerance.launcher"]
            launcher += ["--ft-rank-section-timeouts", f"step:{bound:g}"]
            launcher += ["--ft-enable-nic-monitor", "false"]
            script = [str(Path(__file__)), "--as-rank", way]
        port = f"--rdzv-endpoint=localhost:{free_port()}"
        launcher += ["--nproc-per-node=2", "--rdzv-backend=c10d", port]
        with started([*launcher, *script], **environment):
            end = ended(directory, limit_s)
    return end - float((directory / "fault").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--ways", nargs="*", default=["harness", "nvrx", "torchft"])
    parser.add_argument("--faults", nargs="*", default=list(FAULTS))
    parser.add_argument("--bound", type=float, default=15.0, help="seconds after which it hangs")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one job")
    parser.add_argument("--as-rank", choices=["nvrx", "torchft"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    ranks: dict[str, Callable[[], None]] = {"nvrx": nvrx, "torchft": torchft}
    if args.as_rank:
        ranks[args.as_rank]()
        return
    for way in args.ways:
        for fault in args.faults:
            with TemporaryDirectory() as directory:
                try:
                    result = f"{seconds(way, fault, args.bound, args.limit, Path(directory)):.1f} s"
                except Exception as error:
                    with suppress(OSError):
                        sys.stderr.write((Path(directory) / "output").read_text()[-3000:])
                    result = f"failed: {type(error).__name__}: {error}"
            sys.stdout.write(f"{way:<8} {fault:<6} {result}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
