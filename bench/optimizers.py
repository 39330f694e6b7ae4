"""Held-out loss of the default task after the same tokens: AdamW, APOLLO, APOLLO-Mini, Muon, SOAP.

    python -m bench.optimizers [--steps 400] [--ranks 2] [--rank 32] [--lrs 1e-3 2e-3 5e-3 1e-2]
                               [--only muon soap]

Every optimizer gets the same grid of learning rates, the same data, and no weight decay. Prints
each run as it ends, then the best of each optimizer, its state on the rank with the most, and the
median time of a step.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from torch import nn

from harness.config import Config
from harness.config.load import load
from harness.optim import Muon, Soap, apollo_param_groups, matrix_param_groups
from harness.optim.apollo.memory import state_bytes
from harness.optim.matrices import memory
from harness.run import run_in_world
from harness.task import load_task
from harness.testing.pool import RankPool

TASK = Path(__file__).parent.parent / "launch/tasks/byte_lm.toml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-3, 2e-3, 5e-3, 1e-2])
    parser.add_argument("--only", nargs="+", default=[])
    options = parser.parse_args()
    optimizers: dict[str, dict[str, Any]] = {
        "adamw": {"name": "adamw", "weight_decay": 0.0},
        "apollo": {"name": "apollo", "rank": options.rank},
        "apollo-mini": {"name": "apollo-mini"},
        "muon": {"name": "muon", "adjust_lr": "match_rms_adamw"},
        "soap": {"name": "soap", "weight_decay": 0.0},
    }
    if options.only:
        optimizers = {name: optimizers[name] for name in options.only}
    best: dict[str, tuple[float, float]] = {}
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as directory, RankPool(options.ranks, 1e5) as pool:
        for name, settings in optimizers.items():
            for lr in options.lrs:
                optimizer = settings | {"lr": lr, "betas": [0.9, 0.95]}
                config = config_of(Path(directory) / f"{name}-{lr:g}", optimizer, options.steps)
                pool.run(run_in_world, config)
                loss = held_out_loss(config)
                times.setdefault(name, []).append(seconds_of_a_step(config))
                say(f"{name:>12} {lr:8g} {loss:8.4f}")
                best[name] = min(best.get(name, (float("inf"), lr)), (loss, lr))
    model = load_task(load(TASK)).models["lm"]
    first = next(iter(best.values()))[0]
    say("\n| optimizer | best lr | held-out loss | / first | state, MiB | ms a step |")
    say("|---|--:|--:|--:|--:|--:|")
    for name, (loss, lr) in best.items():
        state = max(bytes_of(model, name, options.rank, options.ranks)) / 2**20
        step = 1e3 * median(times[name])
        say(f"| {name} | {lr:g} | {loss:.4f} | {loss / first:.4f} | {state:.2f} | {step:.1f} |")


def bytes_of(model: nn.Module, name: str, rank: int, ranks: int) -> list[int]:
    """Bytes of an optimizer's state at ZeRO 2, by rank."""
    if name in ("muon", "soap"):
        kind = Muon if name == "muon" else Soap
        return memory.state_bytes(kind(matrix_param_groups(model)).param_groups, 2, ranks)
    groups = apollo_param_groups(model, rank=1 if name == "apollo-mini" else rank)
    if name == "adamw":
        groups = [group | {"rank": 0} for group in groups]
    return state_bytes(groups, 2, ranks)


def config_of(directory: Path, optimizer: dict[str, Any], steps: int) -> Config:
    """The default task with another optimizer, evaluated only at its end."""
    overrides = {
        "run": {"dir": str(directory), "steps": steps},
        "engines": {"lm": {"scheduler": {"warmup": max(1, steps // 10)}}},
        "trainer": {"save_every": 0, "eval_every": 0, "save_at_end": False},
        "control": {"stdin": False},
    }
    config = load(TASK, overrides)
    engine = config.engines["lm"]
    table = config.model_dump(mode="json") | {"engines": {"lm": {}}}
    table["engines"]["lm"] = engine.model_dump(mode="json") | {"optimizer": optimizer}
    return Config.model_validate(table)


def held_out_loss(config: Config) -> float:
    """The loss of the last evaluation."""
    return values_of(config, "eval/loss")[-1]


def seconds_of_a_step(config: Config) -> float:
    """The median over a run's steps."""
    return median(values_of(config, "step_time_s"))


def values_of(config: Config, name: str) -> list[float]:
    """What a run has recorded under a name."""
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    return [record[name] for record in map(json.loads, lines) if name in record]


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
