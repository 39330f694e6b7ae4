"""Random faults under `harness run`: ranks forked from one process, so that a start takes a second.

Whatever happens, the final weights are those of a run without faults, to the bit; every sample is
trained on once; nothing is left behind; and the ledger adds up. In two of three runs a loss is NaN
as well, wherever the other faults fall: by the step, which is skipped, or by a sample, whose step
is rolled back; so it is in the run that they are compared with.

    TORCH_CPP_LOG_LEVEL=ERROR python -m tests.support.soak DIR FAULTS [SEED]
"""

import atexit
import contextlib
import ctypes
import json
import os
import random
import runpy
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import psutil
import torch

from harness.distributed import free_port
from harness.files import locked
from harness.health import attempt
from harness.health.goodput import FILE, read, seconds_by_kind
from harness.health.supervisor import PASSED_ON, Supervisor
from harness.io import load
from harness.testing import preload  # noqa: F401 (for the forks)
from tests.support.helpers import ROOT

RANKS, STEPS, SAVE_EVERY, MICRO_BATCH = 2, 30, 3, 4
FAULTS_A_RUN = 5
STEPS_A_FAULT = STEPS // FAULTS_A_RUN
SAMPLES = STEPS * RANKS * MICRO_BATCH
NAN = {
    "": f"samples = {SAMPLES}",
    "skip": f"samples = {SAMPLES}\nnan_steps = [8, 17]",
    "rollback": f"samples = {SAMPLES + RANKS * MICRO_BATCH}\nnan_samples = [100]",
}
"""What the task has of it, by `health.nonfinite`. A rollback drops a step's samples."""

IN_THE_TASK = ("raise", "raise all", "exit", "_exit")
FROM_OUTSIDE = ("kill", "term", "stop", "launcher", "save", "both")
KINDS = (*FROM_OUTSIDE, *IN_THE_TASK)
RARE = {"stop": 0.3, "raise": 0.3, "exit": 0.3}
"""Those that take seconds until the other rank gives up."""


@dataclass(frozen=True)
class Fault:
    """What happens in one attempt."""

    kind: str
    rank: int
    step: int
    delay_s: float
    """After the step has begun, or a save."""


def draw(rng: random.Random, number: int, kind: str | None = None) -> Fault:
    """A fault for the `number`-th attempt of a run, in its own stretch of steps."""
    weights = [RARE.get(known, 1.0) for known in KINDS]
    chosen = kind or rng.choices(KINDS, weights)[0]
    step = number * STEPS_A_FAULT + rng.randint(1, STEPS_A_FAULT)
    return Fault(chosen, rng.randrange(RANKS), step, rng.random() * 0.02)


def write_config(
    directory: Path, stage: int, nonfinite: str, background: bool = False, workers: int = 0
) -> Path:
    directory.mkdir(parents=True)
    (directory / "notes").mkdir()
    path = directory / "soak.toml"
    path.write_text(f"""
        [run]
        dir = "{directory}/runs"
        name = "r"
        steps = {STEPS}
        timeout_s = 300
        [task]
        path = "{ROOT}/tests/tasks/soak_task.py"
        [task.args]
        notes = "{directory}/notes"
        {NAN[nonfinite]}
        [health]
        nonfinite = "{nonfinite or "stop"}"
        timeouts = {{ data = 12, forward = 12, backward = 12, step = 12, save = 12 }}
        [engines.net]
        ds_config = "{ROOT}/ds_configs/zero{stage}.json"
        ds_overrides = {{ zero_optimization = {{ stage3_param_persistence_threshold = 0 }} }}
        optimizer = {{ name = "adamw", lr = 1e-2 }}
        [data]
        micro_batch_size = {MICRO_BATCH}
        workers = {workers}
        [trainer]
        save_every = {SAVE_EVERY}
        [checkpoint]
        keep_last = 2
        background = {str(background).lower()}
        [control]
        stdin = false
        [metrics]
        progress = false
    """)
    return path


class Forked:
    """What `subprocess.Popen` is to an attempt: a process that forks the ranks, and looks after
    them as DeepSpeed's launch.py does."""

    faults: Sequence[Fault] = ()
    started = 0

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], preexec_fn: Callable[[], None]
    ):
        number = Forked.started
        fault = self.faults[number] if number < len(self.faults) else None
        Forked.started += 1
        self.pid = fork(lambda: launch(command, env, preexec_fn, fault), "soak-launch")
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(0.02)
        return code

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def fork(body: Callable[[], int], name: str) -> int:
    """The pid of a new process that runs this, and ends with the code that it returns."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        atexit._clear()  # what its parent has to tidy up
        for number in PASSED_ON:
            signal.signal(number, signal.SIG_DFL)
        ctypes.CDLL(None).prctl(15, name.encode())  # PR_SET_NAME
        code = body()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ranks_below() -> list[psutil.Process]:
    """Instead of by their environment, which a fork has from its parent."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.name() == "soak-rank" and process.parent().name() != "soak-rank":  # type: ignore[union-attr]
                found.append(process)
    return found


def launch(
    command: Sequence[str],
    env: Mapping[str, str],
    preexec_fn: Callable[[], None],
    fault: Fault | None,
) -> int:
    """Starts the ranks; when one has failed, ends the others. Returns its code."""
    preexec_fn()
    os.environ.update(env)
    world = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    os.environ.update(world | {"LOCAL_WORLD_SIZE": str(RANKS)})
    os.environ["HARNESS_FAULT"] = ""
    if fault is not None and fault.kind in IN_THE_TASK:
        rank = -1 if fault.kind == "raise all" else fault.rank
        os.environ["HARNESS_FAULT"] = f"{fault.kind.split()[0]} {rank} {fault.step}"
    pids = {r: fork(lambda rank=r: train(command, rank), "soak-rank") for r in range(RANKS)}
    alive = set(pids.values())
    if fault is not None and fault.kind in FROM_OUTSIDE:
        directory = Path(command[-1]).parent
        threading.Thread(target=strike, args=(fault, pids, directory), daemon=True).start()
    while alive:
        pid, status = os.wait()
        alive.discard(pid)
        if code := os.waitstatus_to_exitcode(status):
            end(list(alive))
            return code if code > 0 else 128 - code
    return 0


def end(pids: Sequence[int]) -> None:
    """SIGTERM, and SIGKILL after 3 s (DeepSpeed: 30 s)."""
    processes = [psutil.Process(pid) for pid in pids]
    for process in processes:
        process.terminate()
    _, left = psutil.wait_procs(processes, timeout=3)
    for process in left:
        process.kill()


def train(command: Sequence[str], rank: int) -> int:
    """A rank: what `python launch/train.py ...` does."""
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank)})
    if rank == 0:
        with (Path(command[-1]).parent / "notes/starts").open("a") as file:
            file.write(f"{time.time()}\n")
    sys.argv = list(command)
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else bool(ending.code)
    return 0


def strike(fault: Fault, pids: Mapping[int, int], directory: Path) -> None:
    """A fault from outside, at a random moment of its step, or of the next save."""
    notes = directory / f"notes/rank-{fault.rank}.jsonl"
    begins = notes.stat().st_size if notes.exists() else 0
    while not (notes.exists() and _last_step(notes, begins) >= fault.step):
        time.sleep(0.002)
    if fault.kind == "save":
        checkpoints = directory / "runs/r/checkpoints"
        while not any("tmp" in path.name for path in checkpoints.glob("*")):
            time.sleep(0.0005)
    time.sleep(fault.delay_s)
    with contextlib.suppress(ProcessLookupError):
        match fault.kind:
            case "launcher":
                os.kill(os.getpid(), signal.SIGKILL)
            case "both":
                for pid in pids.values():
                    os.kill(pid, signal.SIGKILL)
            case "term":
                os.kill(pids[fault.rank], signal.SIGTERM)
            case "stop":
                os.kill(pids[fault.rank], signal.SIGSTOP)
            case _:
                os.kill(pids[fault.rank], signal.SIGKILL)


def _last_step(notes: Path, begins: int) -> int:
    """The last complete line of what was written since."""
    with notes.open() as file:
        file.seek(begins)
        lines = [line for line in file.read().splitlines(keepends=True) if line.endswith("\n")]
    return json.loads(lines[-1])[0] if lines else 0


def run(config: Path, faults: Sequence[Fault]) -> dict[str, Any]:
    """A run with these faults, and what it has left."""
    Forked.faults, Forked.started = faults, 0
    began, shared = time.time(), shared_memory()
    command = [str(ROOT / "launch/train.py"), "--config", str(config)]
    with (
        patch.object(attempt, "subprocess", SimpleNamespace(Popen=Forked)),
        patch.object(attempt, "_ranks", ranks_below),
    ):
        code = Supervisor(command, max_restarts=100, backoff_s=0.0).run()
    took = time.time() - began
    directory = config.parent / "runs/r"
    assert code == 0, f"exit code {code}"
    processes = psutil.Process().children(recursive=True)
    assert not processes, processes
    with locked(directory / "control/lock"):
        pass
    left = [path for path in directory.rglob("*") if "tmp" in path.name or path.is_socket()]
    assert not left, left
    assert not shared_memory() - shared, shared_memory() - shared
    records, spent = read(directory / FILE), seconds_by_kind(directory / FILE)
    ledger = records[-1]["time"] - records[0]["began"]
    assert abs(sum(spent.values()) - ledger) <= 1e-3 * ledger, (spent, ledger)
    began = float((config.parent / "notes/starts").read_text().split()[0])
    ended = json.loads((directory / "ended.json").read_text())["time"]
    return {
        "weights": weights_of(directory),
        "history": history(config.parent / "notes"),
        "starts": Forked.started,
        "seconds": took,
        "wall": ended - began,
        "ledger": ledger,
        "spent": spent,
    }


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    """The exported weights of the last step."""
    return load(directory / f"exports/step-{STEPS:08d}/net.sft")


def shared_memory() -> set[str]:
    """What processes that have ended have left: torch_PID_..."""
    names = (path.name for path in Path("/dev/shm").glob("torch_*"))
    return {name for name in names if not psutil.pid_exists(int(name.split("_")[1]))}


def history(notes: Path) -> dict[tuple[int, int], list[int]]:
    """The samples by rank and step, of the last time that the step was taken."""
    found = {}
    for rank in range(RANKS):
        for line in (notes / f"rank-{rank}.jsonl").read_text().splitlines():
            step, numbers = json.loads(line)
            found[rank, step] = numbers
    return found


def check(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Fails unless it is the run without faults."""
    assert found["history"] == expected["history"]
    counts = Counter(number for numbers in found["history"].values() for number in numbers)
    assert len(counts) == counts.total() == SAMPLES
    assert found["weights"].keys() == expected["weights"].keys()
    for name, tensor in expected["weights"].items():
        assert torch.equal(found["weights"][name], tensor), name


def soak(
    directory: Path, faults: int, seed: int, kinds: Sequence[str] | None = None
) -> dict[str, float]:
    """Runs with so many faults in all, at each ZeRO stage in turn; `kinds`: those of each run
    instead of random ones. Fails if one of them differs from the run without faults."""
    torch.set_num_threads(1)
    os.environ.update({"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"})
    os.environ["TORCH_EXTENSIONS_DIR"] = str(directory / "extensions")
    rng, expected, totals = random.Random(seed), {}, Counter[str]()
    while totals["faults"] < faults:
        number = totals["runs"]
        stage, nonfinite = (2 + number) % 4, ("rollback", "", "skip")[number % 3]
        background, workers = number % 5 in (1, 3), int(number % 7 == 2)
        if (stage, nonfinite) not in expected:
            plain = write_config(directory / f"plain-{stage}-{nonfinite}", stage, nonfinite)
            expected[stage, nonfinite] = run(plain, [])
        config = write_config(directory / f"run-{number}", stage, nonfinite, background, workers)
        chosen = [draw(rng, n, kinds[n] if kinds else None) for n in range(FAULTS_A_RUN)]
        sys.stderr.write(
            f"run {number}: stage {stage}, {nonfinite=}, {background=}, {workers=}: {chosen}\n"
        )
        found = run(config, chosen)
        check(found, expected[stage, nonfinite])
        struck = found["starts"] - 1  # a fault in a save may come too late for one
        totals.update({"runs": 1, "faults": struck})
        totals.update({key: found[key] for key in ("seconds", "wall", "ledger")})
        totals.update(fault.kind for fault in chosen[:struck])
        totals.update(found["spent"])
        sys.stderr.write(f"after {number + 1} runs: {dict(totals)}\n")
        shutil.rmtree(config.parent)
    # From the start of the first rank 0's process to the outcome of the last.
    assert abs(totals["ledger"] - totals["wall"]) <= 0.01 * totals["wall"], totals
    return dict(totals)


if __name__ == "__main__":
    words = sys.argv[1:]
    sys.stdout.write(f"{soak(Path(words[0]), int(words[1]), int((words[2:] or ['0'])[0]))}\n")
