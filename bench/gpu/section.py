"""What the sections share: their options, and results that are written as they come."""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from harness.config import Config
from harness.config.load import load

ROOT = Path(__file__).parents[2]


class Section:
    """The options of a section, and its results so far."""

    def __init__(self, file: Path, quick: bool, small: bool):
        self.quick = quick
        """Whether to take the shortest that still says something."""
        self.small = small
        """Whether to imitate it on a CPU: tiny sizes, figures without meaning."""
        self.is_on_gpu = torch.cuda.is_available() and not small
        self.device = torch.device("cuda", 0) if self.is_on_gpu else torch.device("cpu")
        self._file = file
        self._results: dict[str, Any] = {}

    def add(self, name: str, result: Any) -> None:
        """Adds a result, and writes all: a limit may end the section at any time."""
        self._results[name] = result
        self._file.write_text(json.dumps(self._results, indent=1))

    def try_to(self, name: str, measure: Callable[[], Any]) -> None:
        """Adds what `measure` returns, or its error: the others still follow."""
        try:
            self.add(name, measure())
        except Exception as error:
            self.add(name, {"error": f"{type(error).__name__}: {error}"[:500]})

    def settle(self) -> None:
        """Waits until the device has done everything."""
        if self.is_on_gpu:
            torch.cuda.synchronize()

    def launches(self, function: Callable[[], object]) -> dict[str, Any]:
        """Kernels and copies that a call launches, and the milliseconds that they run; on a CPU
        torch's operations."""
        from torch.profiler import ProfilerActivity, profile

        kind = ProfilerActivity.CUDA if self.is_on_gpu else ProfilerActivity.CPU
        self.settle()
        with profile(activities=[kind]) as found:
            function()
            self.settle()
        device = "CUDA" if self.is_on_gpu else "CPU"
        events = [event for event in found.events() or [] if event.device_type.name == device]
        busy = sum(event.device_time for event in events) / 1e3
        return {"launches": len(events), "busy ms": round(busy, 3)}

    def clock(self, function: Callable[[], object]) -> float:
        """Seconds that a call takes, until the device has done it."""
        self.settle()
        started = time.perf_counter()
        function()
        self.settle()
        return time.perf_counter() - started


def run_section(measure: Callable[[Section], None]) -> None:
    """The `main` of a section's process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    measure(Section(args.file, args.quick, args.small))


def config_of(section: Section, stage: int, dtype: str, steps: int, **tables: Any) -> Config:
    """A run of the default task in a new directory, without saves and evaluations. `tables` replace
    keys of the default's, section by section."""
    from harness.config.sections import merge

    size = {"seq_len": 16, "dim": 32, "layers": 2, "heads": 2} if section.small else {}
    overrides: dict[str, Any] = {
        "run": {"dir": tempfile.mkdtemp(prefix="bench-gpu-"), "name": "run", "steps": steps},
        "task": {"args": {"eval_windows": 1} | size},
        "engines": {
            "lm": {
                "ds_config": f"ds_configs/zero{stage}.json",
                "ds_overrides": {dtype: {"enabled": True}} if dtype != "fp32" else {},
            }
        },
        "trainer": {
            **dict.fromkeys(("save_every", "eval_every"), 0),
            **dict.fromkeys(("save_at_end", "export_at_end"), False),
        },
        "control": {"stdin": False, "socket": False},
        "metrics": {"progress": False},
    }
    return load(ROOT / "launch/tasks/byte_lm.toml", merge(overrides, tables))


def median_step_s(config: Config) -> float | None:
    """The median of `step_time_s` in a run's metrics, without its first steps."""
    import statistics

    found = []
    with suppress(OSError):
        for line in (config.run_dir / "metrics.jsonl").read_text().splitlines():
            if seconds := json.loads(line).get("step_time_s"):
                found.append(seconds)
    return statistics.median(found[len(found) // 4 :]) if found else None
