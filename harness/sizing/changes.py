"""Changes of a setting that would make it fit, ranked by what they cost."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from harness.sizing.setting import Setting


@dataclass(frozen=True)
class Change:
    """Something to change, or several things."""

    names: tuple[str, ...]
    cost: int
    """For the order alone: about the percents of a step's time that it may cost."""
    setting: Setting
    bytes: int
    """Device memory per rank with it."""


MOST_TOGETHER = 3


def changes_that_fit(
    setting: Setting, needs: Callable[[Setting], int], memory: int
) -> list[Change]:
    """Changes with which `needs` is at most `memory` bytes, the cheapest first; none of them has a
    part that fits without the rest."""
    single = list(_single(setting))
    found: list[Change] = []
    for count in range(1, MOST_TOGETHER + 1):
        for chosen in combinations(single, count):
            names = tuple(name for name, _, _ in chosen)
            keys = [key for _, _, values in chosen for key in values]
            if len(set(keys)) < len(keys) or any(set(c.names) <= set(names) for c in found):
                continue
            values = {key: value for _, _, part in chosen for key, value in part.items()}
            if values.get("offload") == "all" and values.get("stage", setting.stage) < 3:
                continue
            if values.get("offload") == "optimizer" and values.get("stage", setting.stage) < 1:
                continue
            changed = replace(setting, **values)
            if (size := needs(changed)) <= memory:
                found.append(Change(names, sum(cost for _, cost, _ in chosen), changed, size))
    return sorted(found, key=lambda change: change.cost)


def _single(setting: Setting) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """`(name, cost, values)`. The costs: stages 1 and 2 send what stage 0 sends, stage 3 half as
    much again; a second forward is a third of a step's compute; the host's bus is slow."""
    if setting.ranks > 1:
        for stage in range(setting.stage + 1, 4):
            yield f"stage {stage}", {1: 1, 2: 2, 3: 15}[stage], {"stage": stage}
    if setting.precision == "fp32":
        yield "precision bf16", 3, {"precision": "bf16"}
    if setting.micro_batch > 1:
        half = setting.micro_batch // 2
        values: dict[str, Any] = {
            "micro_batch": half,
            "accumulation": setting.accumulation * setting.micro_batch // half,
        }
        yield f"micro-batch {half}, accumulation {values['accumulation']}", 5, values
    if setting.optimizer == "adamw":
        yield "optimizer apollo", 10, {"optimizer": "apollo"}
    if not setting.checkpointing:
        yield "checkpointing", 33, {"checkpointing": True}
    for factor in (2, 4, 8):
        if setting.stage:
            yield f"ranks {setting.ranks * factor}", 40 * factor, {"ranks": setting.ranks * factor}
    if setting.offload == "none":
        yield "offload optimizer", 60, {"offload": "optimizer"}
    if setting.offload != "all":
        yield "offload all", 120, {"offload": "all"}
