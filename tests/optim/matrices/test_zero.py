"""Muon and SOAP under every ZeRO stage and wrapper ends where the unsharded optimizer ends.

Gradients are injected, so that nothing amplifies rounding; the bound is on |difference| / max|W| of
every parameter after 40 steps.
"""

from collections.abc import Callable
from typing import Any

import pytest

from harness.testing.pool import RankPool
from tests.support.given_gradients import difference
from tests.support.helpers import Pools
from tests.support.matrix_optimizers import muon, soap

BOUNDS: dict[Callable[..., Any], float] = {muon: 5e-7, soap: 2e-6}
OPTIMIZERS = pytest.mark.parametrize("make", BOUNDS, ids=lambda make: make.__name__)
SLOW = pytest.mark.slow

FP32_ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}}  # DeepSpeed's BF16_Optimizer
OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
BOTH = {"parameter_alignment": True, "round_robin_gradients": True}
ODD: dict[str, tuple[int, dict[str, Any]]] = {
    "round robin and alignment": (2, {"zero_optimization": BOTH}),
    "sub-groups": (3, {"zero_optimization": {"sub_group_size": 300}}),
    "offload 1": (1, OFFLOAD),
    "offload 2": (2, OFFLOAD),
    "offload 3": (3, OFFLOAD),
    "accumulation 2": (2, {"gradient_accumulation_steps": 4}),
    "accumulation 3": (3, {"gradient_accumulation_steps": 4}),
    "all groups in one step": (1, FP32_ACCUMULATION),
    "persistent": (3, {"zero_optimization": {"stage3_param_persistence_threshold": 1000}}),
}


def within_bound(pool: RankPool, make: Callable[..., Any], *what: Any, steps: int = 40) -> None:
    stage, dtype, overrides = what
    for found in pool.run(difference, stage, dtype, False, overrides, steps, None, make):
        assert found <= BOUNDS[make], found


GRID = [
    (world, stage, t) for world in (2, 3, 4) for stage in (0, 1, 2, 3) for t in ("fp32", "bf16")
]
QUICK = {(2, 0, "bf16"), (2, 1, "fp32"), (3, 3, "bf16")}


@OPTIMIZERS
@pytest.mark.parametrize(
    ("world", "stage", "dtype"),
    [pytest.param(*case, marks=() if case in QUICK else SLOW) for case in GRID],
)
def test_stages(pools: Pools, world: int, stage: int, dtype: str, make: Callable[..., Any]) -> None:
    within_bound(pools(world), make, stage, dtype, {})


@OPTIMIZERS
@pytest.mark.parametrize(
    "layout",
    [pytest.param(n, marks=() if n == "sub-groups" else SLOW) for n in ODD],
)
def test_odd_layouts(two_ranks: RankPool, layout: str, make: Callable[..., Any]) -> None:
    stage, overrides = ODD[layout]
    for dtype in ("bf16",) if "one step" in layout else ("fp32", "bf16"):
        within_bound(two_ranks, make, stage, dtype, overrides)
