"""Muon and SOAP under every ZeRO stage and wrapper ends where the unsharded optimizer ends.

Gradients are injected, so that nothing amplifies rounding; the bound is on |difference| / max|W| of
every parameter after 40 steps.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from harness.testing.pool import RankPool
from tests.support.given_gradients import difference
from tests.support.helpers import Pools
from tests.support.matrix_optimizers import muon, soap
from tests.support.quick import quick

BOUNDS: dict[Callable[..., Any], float] = {muon: 5e-7, soap: 2e-6}

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


DTYPES = ("fp32", "bf16")
GRID = itertools.product(BOUNDS, (2, 3, 4), (0, 1, 2, 3), DTYPES)


@pytest.mark.parametrize(
    ("make", "world", "stage", "dtype"),
    quick(
        GRID, (muon, 2, 0, "bf16"), (muon, 3, 3, "fp32"), (soap, 2, 1, "fp32"), (soap, 3, 3, "bf16")
    ),
)
def test_stages(pools: Pools, make: Callable[..., Any], world: int, stage: int, dtype: str) -> None:
    within_bound(pools(world), make, stage, dtype, {})


@pytest.mark.parametrize(
    ("make", "layout", "dtype"),
    quick(
        [
            case
            for case in itertools.product(BOUNDS, ODD, DTYPES)
            if case[1:] != ("all groups in one step", "fp32")
        ],
        (muon, "sub-groups", "fp32"),
        (soap, "sub-groups", "bf16"),
    ),
)
def test_odd_layouts(
    two_ranks: RankPool, make: Callable[..., Any], layout: str, dtype: str
) -> None:
    stage, overrides = ODD[layout]
    within_bound(two_ranks, make, stage, dtype, overrides)
