"""APOLLO under every ZeRO stage and wrapper ends where the unsharded optimizer ends.

Gradients are injected, so that nothing amplifies rounding; the bound is on |difference| / max|W| of
every parameter after 40 steps. P is refreshed every 15 steps, and the limiter limits.
"""

from typing import Any

import pytest

from harness.optim import Apollo, ApolloMini
from harness.optim.apollo.lowrank import LowRank
from harness.testing.pool import RankPool
from tests.support.given_gradients import (
    Given,
    Shapes,
    apollo,
    difference,
    engine_of,
    masters,
    take_plain_steps,
    take_steps,
    worst,
)
from tests.support.quick import quick

BOUND = 5e-7

FP32_ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}}  # DeepSpeed's BF16_Optimizer
OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
STAGES = [(stage, dtype) for stage in (0, 1, 2, 3) for dtype in ("fp32", "bf16")]
SLOW = pytest.mark.slow
ODD = {
    "round robin": (2, {"zero_optimization": {"round_robin_gradients": True}}),
    "alignment": (1, {"zero_optimization": {"parameter_alignment": True}}),
    "both": (
        2,
        {"zero_optimization": {"parameter_alignment": True, "round_robin_gradients": True}},
    ),
    "non-contiguous": (2, {"zero_optimization": {"contiguous_gradients": False}}),
    "sub-groups": (3, {"zero_optimization": {"sub_group_size": 300}}),
    "offload 1": (1, OFFLOAD),
    "offload 2": (2, OFFLOAD),
    "offload 3": (3, OFFLOAD),
    "accumulation 1": (1, {"gradient_accumulation_steps": 2}),
    "accumulation 3": (3, {"gradient_accumulation_steps": 2}),
    "persistent": (3, {"zero_optimization": {"stage3_param_persistence_threshold": 1000}}),
}


DEFAULT = ("both", "sub-groups")
"""The layouts that the default suite tries; the others are slow."""


def within_bound(pool: RankPool, *what: Any) -> None:
    for found in pool.run(difference, *what):
        assert found <= BOUND, found


@pytest.mark.parametrize(
    ("stage", "dtype", "mini"),
    quick(
        [(*case, mini) for case in STAGES for mini in (False, True)],
        (0, "bf16", False),
        (2, "bf16", False),
        (3, "fp32", False),
        (0, "fp32", True),
        (1, "bf16", True),
        (2, "fp32", True),
    ),
)
def test_two_ranks(two_ranks: RankPool, stage: int, dtype: str, mini: bool) -> None:
    within_bound(two_ranks, stage, dtype, mini, {})


@pytest.mark.parametrize(
    ("stage", "dtype", "mini"),
    quick(
        [
            (*case, mini)
            for case in ((1, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16"))
            for mini in (False, True)
        ],
        (1, "fp32", False),
        (3, "bf16", True),
    ),
)
def test_three_ranks(three_ranks: RankPool, stage: int, dtype: str, mini: bool) -> None:
    within_bound(three_ranks, stage, dtype, mini, {})


@pytest.mark.parametrize("mini", [False, pytest.param(True, marks=SLOW)], ids=["apollo", "mini"])
@pytest.mark.parametrize(
    ("stage", "dtype"),
    [
        (3, "fp32"),
        pytest.param(2, "fp32", marks=SLOW),
        pytest.param(1, "bf16", marks=SLOW),
        pytest.param(3, "bf16", marks=SLOW),
    ],
)
def test_four_ranks(four_ranks: RankPool, stage: int, dtype: str, mini: bool) -> None:
    within_bound(four_ranks, stage, dtype, mini, {})


@pytest.mark.parametrize("mini", [False, pytest.param(True, marks=SLOW)], ids=["apollo", "mini"])
def test_bf16_optimizer(two_ranks: RankPool, three_ranks: RankPool, mini: bool) -> None:
    """All parameter groups in one call of step()."""
    within_bound(two_ranks, 1, "bf16", mini, FP32_ACCUMULATION)
    within_bound(three_ranks, 1, "bf16", mini, FP32_ACCUMULATION)


@pytest.mark.parametrize(
    "layout",
    [
        *DEFAULT,
        *(pytest.param(name, marks=SLOW) for name in ODD if name not in DEFAULT),
    ],
)
def test_odd_layouts(two_ranks: RankPool, three_ranks: RankPool, layout: str) -> None:
    stage, overrides = ODD[layout]
    within_bound(two_ranks, stage, "fp32", False, overrides)
    within_bound(three_ranks, stage, "bf16", True, overrides)


@pytest.mark.parametrize(
    "settings",
    [
        {"scale_front": True},
        {"projection": "rademacher"},
        {"projection": "svd"},
        {"gamma": None},
        {"scale_type": "tensor"},
        {"update_proj_gap": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("stage", [3, pytest.param(2, marks=SLOW)])
def test_settings(three_ranks: RankPool, stage: int, settings: dict[str, Any]) -> None:
    within_bound(three_ranks, stage, "fp32", False, {}, 20, settings)


@pytest.mark.parametrize("dtype", quick(["fp32", "bf16"], "bf16"))
def test_a_model_built_sharded(two_ranks: RankPool, dtype: str) -> None:
    within_bound(two_ranks, 3, dtype, False, {}, 40, {}, apollo, True)


def cut_between_rows(stage: int, mini: bool) -> float:
    """As `difference`, for matrices that ranks share although no row of them is cut."""
    shapes: Shapes = {"one": (24, 16), "other": (48, 8), "third": (64, 4)}
    model, reference = Given(shapes), Given(shapes)

    def make(of: Given) -> Apollo:
        group = {"params": list(of.parameters()), "param_names": list(shapes)}
        return (ApolloMini if mini else Apollo)([group], lr=1e-2, rank=1 if mini else 3)

    optimizer = make(model)
    engine = engine_of(model, optimizer, stage, "fp32", {})
    take_steps(engine, range(20), shapes)
    take_plain_steps(reference, make(reference), range(20), shapes)
    found = masters(optimizer)
    (group,) = optimizer._tensor_groups.values()
    assert isinstance(group, LowRank) and group.plan.is_cut and not group.plan.shared
    engine.destroy()
    return worst(found, reference)


@pytest.mark.parametrize(
    ("stage", "mini"),
    quick([(1, False), (1, True), (3, False), (3, True)], (1, True), (3, False)),
)
def test_boundaries_between_rows(two_ranks: RankPool, stage: int, mini: bool) -> None:
    for found in two_ranks.run(cut_between_rows, stage, mini):
        assert found <= BOUND, found


def test_the_bound_is_sharp(two_ranks: RankPool) -> None:
    """Another P alone, with all else equal, is far outside of the bound."""
    assert min(two_ranks.run(difference_with_another_seed)) > 1000 * BOUND


def difference_with_another_seed() -> float:
    seeds = iter((0, 1))

    def make(*args: Any, **settings: Any) -> Any:
        return apollo(*args, seed=next(seeds), **settings)

    return difference(2, "fp32", False, {}, 40, {}, make)
