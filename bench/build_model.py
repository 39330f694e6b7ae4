"""Host memory while a model is built for ZeRO stage 3: by the task, and by a function.

    python -m bench.build_model [--ranks 2] [--width 2048] [--layers 24]

Prints the peak resident memory of one rank, above what it was before, as the ratio to the bytes of
the model's fp32 weights: with the model alone, and with its engine (bf16, AdamW).
"""

import argparse
import os
import resource
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

from torch import nn

from harness.config import Config
from harness.testing.pool import RankPool

ROOT = Path(__file__).parent.parent
TABLE: dict[str, Any] = {
    "run": {"name": "bench", "dir": "unused"},
    "task": {"path": str(ROOT / "tests/tasks/tiny_task.py")},
    "engines": {
        "net": {
            "ds_config": ROOT / "ds_configs/zero3.json",
            "ds_overrides": {"bf16": {"enabled": True}},
            "optimizer": {"name": "adamw"},
        }
    },
}


def measure(width: int, layers: int, is_function: bool) -> tuple[int, int]:
    """Bytes of peak resident memory on this rank: of the model, and of the engine with it."""
    from harness.engine.build import build_engines
    from harness.engine.models import build_models
    from harness.task import Task

    def build() -> nn.Module:
        return nn.Sequential(OrderedDict((f"l{i}", nn.Linear(width, width)) for i in range(layers)))

    config = Config.model_validate(TABLE)
    before = peak()
    models = build_models({"net": build if is_function else build()}, config)
    built = peak()
    build_engines(Task(models=models, train_data=[0]), config)
    return built - before, peak() - before


def peak() -> int:
    """Bytes of this process's peak resident memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Measures each way in fresh processes, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=24)
    args = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "1000000"  # what is freed is returned
    full = 4 * args.layers * (args.width**2 + args.width)
    sys.stdout.write(f"{full / 1e6:.0f} MB of fp32 weights, {args.ranks} ranks, ZeRO stage 3\n")
    for name, is_function in {"by the task": False, "by a function": True}.items():
        with RankPool(args.ranks, timeout_s=600) as pool:
            per_rank = pool.run(measure, args.width, args.layers, is_function)
        model, engine = (max(figures) for figures in zip(*per_rank, strict=True))
        sys.stdout.write(f"{name:14} model {model / full:.2f}   engine {engine / full:.2f}\n")


if __name__ == "__main__":
    main()
