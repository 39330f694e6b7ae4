"""Who makes the host wait for the device in a step, by function: `harness/...` should be rare. And
the kernels of a step, by torch's profiler."""

from collections import Counter
from functools import partial
from typing import Any

from bench.gpu.section import Section, config_of, run_section
from harness import distributed
from harness.run import run_in_world
from harness.trainer import Trainer
from harness.zero.startup import join
from tests.support.waits import counted_waits

COUNTED = range(9, 12)
"""Steps, none of them one that searches for changed buffers."""
PROFILED = COUNTED.stop
"""The step after them."""
APOLLO = {"engines": {"lm": {"optimizer": {"name": "apollo", "rank": 16}}}}
OFFLOAD = {"optimizations": {"unsloth": True, "offload": {"budget": "all", "min_bytes": 0}}}
RUNS = [
    ("adamw", 0, "fp32", {}),
    ("adamw", 0, "bf16", {}),
    ("adamw", 2, "bf16", {}),
    ("adamw", 3, "bf16", {}),
    ("apollo", 0, "fp32", APOLLO),
    ("apollo", 2, "bf16", APOLLO),
    ("offload", 2, "bf16", OFFLOAD),
]


def measure(section: Section) -> None:
    distributed.init(300, join)
    for name, stage, dtype, tables in RUNS[-3:] if section.small else RUNS:
        one = partial(waits_of, section, stage, dtype, tables)
        section.try_to(f"{name} zero{stage} {dtype}", one)
    distributed.shutdown()


def waits_of(section: Section, stage: int, dtype: str, tables: dict[str, object]) -> object:
    """Waits per step, by function; and the launches of one."""
    config = config_of(section, stage, dtype, PROFILED + 2, **tables)
    found: Counter[str] = Counter()
    launches: dict[str, Any] = {}
    plain = Trainer.step

    def step(self: Trainer) -> None:
        if self.engines.global_step in COUNTED:
            with counted_waits() as waits:
                plain(self)
            found.update(waits)
        elif self.engines.global_step == PROFILED:
            launches.update(section.launches(lambda: plain(self)))
        else:
            plain(self)

    Trainer.step = step
    try:
        run_in_world(config)
    finally:
        Trainer.step = plain
    return launches | {place: count / len(COUNTED) for place, count in found.most_common(20)}


if __name__ == "__main__":
    run_section(measure)
