"""From the command to the end of the first step: `launch/train.py` beside a bare loop.

    python -m bench.start [--rounds 5]

Both train the model of bench/loop.py on one rank, under DeepSpeed, each in a new process, in turn.
Prints the seconds on the clock from the start of the process, and its CPU seconds; medians, and the
range of the ratio.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.bounded import ROOT
from bench.rows import tell_pair
from harness.distributed import free_port

STAMP = "first step: "
CONFIG = """
[run]
name = "start"
dir = "{directory}"
steps = 1
[task]
path = "bench.start"
[engines.net0]
optimizer = {{ name = "adamw", lr = 1e-4 }}
ds_overrides = {{ zero_optimization = {{ stage = 1 }} }}
[data]
micro_batch_size = 4
[trainer]
save_at_end = false
export_at_end = false
[control]
stdin = false
"""


def build(config: Any) -> Any:
    """The task of `launch/train.py`, which tells when the first step has ended."""
    from bench.loop import Setting, make_task
    from harness.trainer import Trainer

    plain = Trainer.step

    def step(self: Trainer) -> None:
        plain(self)
        tell_the_time()

    Trainer.step = step
    return make_task(Setting(), config)


def bare() -> None:
    """The other process: what somebody would write, but that an op is not compiled for minutes."""
    import deepspeed
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    ops: Any = deepspeed.ops
    ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(15)))
    engine: Any = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-4),
        config={
            "train_micro_batch_size_per_gpu": 4,
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
        },
    )[0]
    data = DataLoader(TensorDataset(torch.randn(4096, 8)), 4, shuffle=True, drop_last=True)
    engine.backward(engine(next(iter(data))[0]).square().mean())
    engine.step()
    tell_the_time()


def tell_the_time() -> None:
    sys.stdout.write(f"{STAMP}{time.monotonic()} {time.process_time()}\n")
    sys.stdout.flush()


def seconds(command: list[str]) -> tuple[float, float]:
    """On the clock, and of CPU."""
    started = time.monotonic()
    single = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = os.environ | single | address | {"DS_ACCELERATOR": "cpu"}
    environment["PYTHONPATH"] = str(ROOT)  # the task is this module
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment
    )
    (stamp,) = (line for line in done.stdout.splitlines() if line.startswith(STAMP))
    ended, cpu = map(float, stamp.removeprefix(STAMP).split())
    return ended - started, cpu


def main() -> None:
    """Runs the rounds and prints both lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bare:
        bare()
        return
    with tempfile.TemporaryDirectory(prefix="bench-start-") as name:
        directory = Path(name)
        (directory / "start.toml").write_text(CONFIG.format(directory=directory))
        config = str(directory / "start.toml")
        ways = {
            "harness": [sys.executable, "launch/train.py", "--config", config],
            "bare": [sys.executable, "-m", "bench.start", "--bare"],
        }
        found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for number in range(args.rounds + 1):
            for way, command in ways.items():
                named = [*command, f"--run.name=start{number}"] if way == "harness" else command
                measured = seconds(named)
                if number:  # the first round warms the cache
                    found[way].append(measured)
    for place, unit in enumerate(("s", "s of CPU")):
        ours, other = ([run[place] for run in runs] for runs in found.values())
        tell_pair("from the command to the first step", unit, ours, "a bare loop", other)
        medians = statistics.median(ours), statistics.median(other)
        sys.stdout.write(f"harness {medians[0]:.2f} {unit}, bare {medians[1]:.2f}\n")


if __name__ == "__main__":
    main()
