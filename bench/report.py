"""How long the report of a long run takes, and how large it is.

CPU time of `harness report`, beside that of `json.loads` of every line of metrics.jsonl alone,
which whoever draws the curves by a script of their own spends before the first curve.

    python -m bench.report --steps 100000
"""

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.rows import Row, tell
from harness.report.build import write_report

PHASES = ("data", "forward", "backward", "optimizer")


def write_metrics(path: Path, steps: int) -> None:
    """Records as a run on two ranks writes them, 30 numbers each, and an evaluation per 1,000."""
    draw = random.Random(0).random
    with path.open("w") as file:
        for step in range(1, steps + 1):
            seconds = 0.1 + 0.02 * draw()
            record = {"step": step, "time": 1.8e9 + step * 0.1, "epoch": 0, "lr": 1e-3 * draw()}
            record |= {"loss_scale": 1.0, "skipped": 0, "spikes": 0, "step_time_s": seconds}
            record |= {f"{phase}_time_s": seconds * draw() for phase in PHASES}
            record |= {"loss": 2 + math.exp(-step / 1000) + draw(), "grad_norm": 1 + draw()}
            for kind in ("min", "mean", "max"):
                record |= {f"step_time_{kind}_s": seconds, f"own_time_{kind}_s": seconds * draw()}
            record |= {f"task/{n}": draw() for n in range(6)} | {"slowest_rank": step % 2}
            record |= {"samples": 8 * step, "tokens": 512 * step, "tokens_per_s": 512 / seconds}
            file.write(json.dumps(record) + "\n")
            if step % 1000 == 0:
                file.write(json.dumps({"step": step, "eval/loss": 2 + draw()}) + "\n")


def cpu_seconds(function: Callable[[], None]) -> tuple[float, float]:
    """CPU and wall time of a call."""
    cpu, wall = time.process_time(), time.monotonic()
    function()
    return time.process_time() - cpu, time.monotonic() - wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch)
        metrics, page = run / "metrics.jsonl", run / "report.html"
        write_metrics(metrics, steps)

        def parse() -> None:
            with metrics.open() as file:
                for line in file:
                    json.loads(line)

        floor, _ = cpu_seconds(parse)
        cpu, wall = cpu_seconds(lambda: write_report([run], page, None, lambda _: None))
        tell(Row(f"harness report of {steps:,} steps", cpu, "s of CPU", "json.loads alone", floor))
        sys.stdout.write(
            f"{steps:,} steps, {metrics.stat().st_size / 1e6:.0f} MB: {cpu:.2f} s of CPU time "
            f"({wall:.2f} s), {cpu / floor:.2f} of json.loads alone ({floor:.2f} s); "
            f"{page.stat().st_size / 1e6:.2f} MB\n"
        )


if __name__ == "__main__":
    main()
