"""A step of harness's loop beside one of a bare loop on DeepSpeed, in turn within one job.

    python -m bench.loop [--parameters 30] [--engines 1] [--numbers 0] [--stage 1]
                         [--micro-batches 1] [--modules 0] [--ranks 1] [--block 20] [--rounds 10]
                         [--profile 30]

Both loops have the same models, data, optimizer and DeepSpeed config, and compute the same numbers,
which the bare loop does not report. They take turns in blocks of steps. Prints a step's CPU time in
both (of all threads of the slowest rank; other work on the machine hardly stretches it) and what
harness adds, as medians over the blocks; and the ratio of a block to its neighbours, as the mean
with its standard error, by CPU time and on the clock. `--modules`: so many modules without
parameters besides. `--profile`: so many functions of harness's with their CPU time, which makes
Python slower.

    python -m bench.loop --grow [--stage 1] [--rounds 10] [--smaller 1]

What harness adds to a step, and how long it takes to build the engines, against parameters,
engines, micro-batches and reported numbers, each with the exponent of its growth; none where the
noise is larger than what is added. `--smaller`: so many times fewer parameters.
"""

import argparse
import cProfile
import io
import math
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.rows import Row, tell
from harness.testing.pool import RankPool

MICRO_BATCH = 4


@dataclass(frozen=True)
class Setting:
    """What is trained, and how."""

    parameters: int = 30
    engines: int = 1
    numbers: int = 0
    """Reported in each micro-batch."""
    stage: int = 1
    micro_batches: int = 1
    modules: int = 0
    """Without parameters, besides."""


@dataclass
class Found:
    """Seconds a step, by block: harness's between two of the bare loop, which has one more."""

    ours: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)

    def around(self) -> Iterator[tuple[float, float]]:
        """Each block of harness's, and the mean of its neighbours."""
        for ours, before, after in zip(self.ours, self.bare, self.bare[1:], strict=False):
            yield ours, (before + after) / 2

    def center(self) -> float:
        """The mean of the ratios."""
        return statistics.fmean(ours / bare for ours, bare in self.around())

    def error(self) -> float:
        """Its standard error."""
        ratios = [ours / bare for ours, bare in self.around()]
        return statistics.stdev(ratios) / math.sqrt(len(ratios))

    def ratio(self) -> str:
        """Mean and standard error."""
        return f"{self.center():.4f} +- {self.error():.4f}"

    def added(self) -> float:
        """Seconds that harness adds to a step, as the median."""
        return statistics.median(ours - bare for ours, bare in self.around())


def build_model(setting: Setting) -> Any:
    """Layers of two parameters each, one after another."""
    from torch import nn

    layers = [nn.Linear(8, 8) for _ in range(setting.parameters // 2)]
    return nn.Sequential(*layers, *(nn.Identity() for _ in range(setting.modules)))


def loss_of(engine: Any, batch: Any, numbers: int) -> tuple[Any, dict[str, Any]]:
    """A loss, and numbers to report."""
    found = engine(batch[0])
    values = found.detach().flatten().repeat(-(-numbers // found.numel()))[:numbers].unbind()
    return found.square().mean(), {f"number{n}": value for n, value in enumerate(values)}


def make_data() -> Any:
    import torch
    from torch.utils.data import TensorDataset

    return TensorDataset(torch.randn(4096, 8))


def make_config(setting: Setting, directory: Path, steps: int) -> Any:
    from harness.config import Config

    engine = {
        "optimizer": {"name": "adamw", "lr": 1e-4},
        "ds_overrides": {
            "zero_optimization": {"stage": setting.stage},
            "gradient_accumulation_steps": setting.micro_batches,
        },
    }
    tables = {
        "run": {"name": "bench", "dir": directory, "steps": steps},
        "task": {"path": "bench"},
        "engines": {f"net{number}": engine for number in range(setting.engines)},
        "data": {"micro_batch_size": MICRO_BATCH},
        "trainer": {"save_at_end": False, "export_at_end": False},
        "control": {"stdin": False},
    }
    return Config.model_validate(tables)


def make_task(setting: Setting, config: Any) -> Any:
    from harness.task import Task

    return Task(
        models={name: build_model(setting) for name in config.engines},
        train_data=make_data(),
        feeder=lambda engine, batch: loss_of(engine, batch, setting.numbers),
    )


def bare_engines(setting: Setting, config: Any) -> list[Any]:
    """The same engines, by DeepSpeed alone."""
    import deepspeed

    from harness.engine.models import engine_settings
    from harness.optim.build import build_optimizer

    engines = []
    for settings in config.engines.values():
        model = build_model(setting)
        optimizer = build_optimizer(model, settings.optimizer)
        table = engine_settings(settings, MICRO_BATCH)
        engines.append(deepspeed.initialize(model=model, optimizer=optimizer, config=table)[0])
    return engines


class BareLoop:
    """As somebody would write it for these engines."""

    def __init__(self, setting: Setting, config: Any):
        self._setting = setting
        self._engines = bare_engines(setting, config)
        self._batches = self._read()

    def _read(self) -> Iterator[Any]:
        from torch.utils.data import DataLoader

        data = make_data()
        while True:
            yield from DataLoader(data, MICRO_BATCH, shuffle=True, drop_last=True)

    def step(self) -> None:
        for _ in range(self._setting.micro_batches):
            batch = next(self._batches)
            for engine in self._engines:
                loss, _ = loss_of(engine, batch, self._setting.numbers)
                engine.backward(loss)
                engine.step()


class Turns:
    """Called before each step of harness's loop: after every block of these, one of the other's."""

    def __init__(self, bare: BareLoop, block: int, profile: cProfile.Profile | None):
        self._bare = bare
        self._block = block
        self._profile = profile
        self._steps = -block  # of the first block, which warms up
        self._began = 0.0, 0.0
        self.cpu, self.clock = Found(), Found()

    def before_step(self) -> None:
        if self._steps == -self._block:
            for _ in range(self._block):
                self._bare.step()
        if self._steps >= 0 and self._steps % self._block == 0:
            if self._steps:
                self._end(self.cpu.ours, self.clock.ours)
            self._begin()
            for _ in range(self._block):
                self._bare.step()
            self._end(self.cpu.bare, self.clock.bare)
            self._begin()
            if self._profile is not None:
                self._profile.enable()
        self._steps += 1

    def _begin(self) -> None:
        self._began = time.process_time(), time.perf_counter()

    def _end(self, cpu: list[float], clock: list[float]) -> None:
        if self._profile is not None:
            self._profile.disable()
        cpu.append((time.process_time() - self._began[0]) / self._block)
        clock.append((time.perf_counter() - self._began[1]) / self._block)


def measure(setting: Setting, block: int, rounds: int, lines: int) -> tuple[Found, Found, str]:
    """Runs the job, on one rank. CPU seconds, seconds on the clock, and the profile."""
    from harness import distributed
    from harness.run import run_in_world
    from harness.trainer import Trainer

    profile = cProfile.Profile(time.thread_time) if lines else None
    with tempfile.TemporaryDirectory(prefix="bench-loop-") as directory:
        place = Path(distributed.broadcast(directory))
        config = make_config(setting, place, block * (rounds + 1) + 1)
        turns = Turns(BareLoop(setting, config), block, profile)
        plain = Trainer.step

        def step(self: Trainer) -> None:
            turns.before_step()
            plain(self)

        Trainer.step = step
        try:
            run_in_world(config, build=lambda config: make_task(setting, config))
        finally:
            Trainer.step = plain
            distributed.barrier()
    text = io.StringIO()
    if profile is not None:
        pstats.Stats(profile, stream=text).sort_stats("cumtime").print_stats("harness/", lines)
    return turns.cpu, turns.clock, text.getvalue()


def measure_building(setting: Setting) -> tuple[float, float]:
    """CPU seconds to build the engines: by harness, and by DeepSpeed alone."""
    from harness.engine.build import build_engines
    from harness.engine.engine import Engine

    def by_harness() -> Any:
        return build_engines(task, config).values()

    def by_deepspeed() -> Any:
        return bare_engines(setting, config)

    config = make_config(setting, Path("unused"), 1)
    task = make_task(setting, config)
    found = []
    for build in (by_harness, by_deepspeed):
        began = time.process_time()
        engines = build()
        found.append(time.process_time() - began)
        for engine in engines:
            end = engine.close if isinstance(engine, Engine) else engine.destroy
            end()
    return found[0], found[1]


def describe(setting: Setting) -> str:
    return ", ".join(f"{name} {value}" for name, value in vars(setting).items() if value)


def compare(pool: RankPool, setting: Setting, args: argparse.Namespace) -> None:
    """Prints a line for one setting."""
    per_rank = pool.run(measure, setting, args.block, args.rounds, args.profile)
    cpu, clock, profile = max(per_rank, key=lambda found: statistics.median(found[0].ours))
    ours, bare = statistics.median(cpu.ours), statistics.median(cpu.bare)
    bare_ms, low, high = bare * 1e3, cpu.center() - cpu.error(), cpu.center() + cpu.error()
    note = f"+{cpu.added() * 1e3:.2f} ms of CPU; spread: standard error"
    tell(
        Row(
            f"a step, {describe(setting)}",
            ours * 1e3,
            "ms",
            "a bare loop",
            bare_ms,
            low,
            high,
            note,
        )
    )
    sys.stdout.write(
        f"{describe(setting)}: harness {ours * 1e3:.3f} ms of CPU a step, bare {bare * 1e3:.3f}, "
        f"+{cpu.added() * 1e3:.3f} ms; x {cpu.ratio()}; on the clock x {clock.ratio()}\n{profile}"
    )
    sys.stdout.flush()


SERIES: dict[str, tuple[Sequence[int], str]] = {
    "parameters": ((300, 3000, 30000), "1 engine"),
    "engines": ((1, 4, 16), "of 30 parameters"),
    "micro_batches": ((1, 8, 64), "of 30 parameters"),
    "numbers": ((10, 100, 1000), "of 30 parameters"),
}
"""What grows, its sizes, and what of."""


def exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float | None:
    """The slope of the line through the logarithms, by least squares; None if a difference is below
    the noise, and so not positive."""
    if min(seconds) <= 0:
        return None
    x, y = ([math.log(value) for value in values] for values in (sizes, seconds))
    return statistics.linear_regression(x, y).slope


def row(name: str, sizes: Sequence[int], seconds: Sequence[float]) -> None:
    """Prints milliseconds at each size, and the exponent."""
    found = exponent(sizes, seconds)
    power = "in the noise" if found is None else f"grows as size ** {found:.2f}"
    tell(Row(f"{name}: {sizes}", seconds[-1] * 1e3, "ms of CPU", note=power))
    cells = " | ".join(f"{size}: {s * 1e3:.2f}" for size, s in zip(sizes, seconds, strict=True))
    sys.stdout.write(f"| {name} | {cells} | {power} |\n")
    sys.stdout.flush()


def grow(pool: RankPool, args: argparse.Namespace) -> None:
    """Prints the table of what grows."""
    for name, (sizes, of) in SERIES.items():
        sizes = [n // args.smaller if name == "parameters" else n for n in sizes]
        settings = [replace(Setting(stage=args.stage), **{name: size}) for size in sizes]
        added, whole = [], []
        for size, setting in zip(sizes, settings, strict=True):
            block = max(2, args.block * sizes[0] // size)
            cpu, *_ = pool.run(measure, setting, block, args.rounds, 0)[0]
            added.append(cpu.added())
            whole.append(statistics.median(cpu.ours))
        row(f"what harness adds to a step, ms by {name} ({of})", sizes, added)
        row(f"a whole step, ms by {name} ({of})", sizes, whole)
        if name in ("parameters", "engines"):
            pool.run(measure_building, settings[0])  # imports
            pairs = [pool.run(measure_building, setting)[0] for setting in settings]
            row(f"building by harness, ms by {name} ({of})", sizes, [ours for ours, _ in pairs])
            row(f"building by DeepSpeed, ms by {name} ({of})", sizes, [bare for _, bare in pairs])


def main() -> None:
    """Runs the rounds and prints the lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in vars(Setting()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--block", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--profile", type=int, default=0)
    parser.add_argument("--grow", action="store_true")
    parser.add_argument("--smaller", type=int, default=1, help="--grow: divides parameters")
    args = parser.parse_args()
    with RankPool(args.ranks, timeout_s=3600) as pool:
        if args.grow:
            grow(pool, args)
            return
        compare(pool, Setting(**{name: getattr(args, name) for name in vars(Setting())}), args)


if __name__ == "__main__":
    main()
