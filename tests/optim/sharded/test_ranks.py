"""Every sharded optimizer on several ranks: they skip the same steps, and hold what is computed."""

import itertools

import pytest
import torch

from harness import distributed
from harness.testing.pool import RankPool
from tests.engine.test_fp16 import with_fp16
from tests.support.given_gradients import (
    Given,
    engine_of,
    gradients_of,
    masters,
    take_plain_steps,
    take_steps,
    worst,
)
from tests.support.quick import quick
from tests.support.sharded_optimizers import KINDS

KEPT = {"update_proj_gap": 100}
"""APOLLO's projection stays the same, though a step is left out."""


def poisoned_on_one_rank(name: str) -> tuple[float, float]:
    """A NaN on rank 1 only, in a step that DeepSpeed does not check itself: how far the masters
    moved in it; and how far they end from a run without that step."""
    unchecked = {"bf16": {"enabled": True, "check_grad_overflow": False}}
    kind, settings = KINDS[name], KEPT if name.startswith("apollo") else {}
    model, reference = Given(), Given()
    optimizer = kind.of(model, **settings)
    engine = engine_of(model, optimizer, 1, "fp32", unchecked)
    take_steps(engine, range(3))
    before = masters(optimizer)
    gradients = gradients_of(3)
    for group in ("tall", "square", "kernel", "experts", "table"):
        gradients[group] = gradients[group].clone()
        gradients[group].view(-1)[5] = torch.nan if distributed.global_rank() == 1 else 0.0
    engine.backward(engine(gradients))
    engine.step()
    after = masters(optimizer)
    take_steps(engine, range(4, 8))
    unsharded = kind.of(reference, **settings)
    take_plain_steps(reference, unsharded, range(3))
    take_plain_steps(reference, unsharded, range(4, 8))
    found = masters(optimizer)
    engine.destroy()
    moved = max(float((after[name] - before[name]).abs().max()) for name in before)
    return moved, worst(found, reference)


@pytest.mark.parametrize("name", ["apollo", "muon", "soap"])
def test_a_non_finite_gradient_on_one_rank_skips_the_step_on_all(
    two_ranks: RankPool, name: str
) -> None:
    for moved, difference in two_ranks.run(poisoned_on_one_rank, name):
        assert moved == 0.0
        assert difference <= KINDS[name].bound


def measured_and_computed(name: str, stage: int) -> tuple[int, int]:
    """This rank's bytes of state after a step, and what `state_bytes` says of it before."""
    model = Given()
    optimizer = KINDS[name].of(model)
    world = distributed.world_size()
    computed = KINDS[name].state_bytes(optimizer.param_groups, stage, world)
    engine = engine_of(model, optimizer, stage, "fp32", {})
    take_steps(engine, range(1))
    values = [value for state in optimizer.state.values() for value in state.values()]
    engine.destroy()
    measured = sum(value.nbytes for value in values if isinstance(value, torch.Tensor))
    return measured, computed[distributed.global_rank()]


@pytest.mark.parametrize(
    ("name", "stage"),
    quick(
        itertools.product(KINDS, (0, 1, 2, 3)),
        *((name, stage) for name in KINDS for stage in (0, 2, 3)),
    ),
)
def test_state_takes_as_many_bytes_as_is_computed(
    three_ranks: RankPool, name: str, stage: int
) -> None:
    for measured, computed in three_ranks.run(measured_and_computed, name, stage):
        assert measured == computed


def from_an_overflow_on(name: str, stage: int) -> float:
    """fp16 with a scale that is too large for the first steps: how far three others end from plain
    ones."""
    kind, model, reference = KINDS[name], Given(), Given()
    optimizer = kind.of(model)
    fp16 = {"enabled": True, "initial_scale_power": 14, "hysteresis": 1}
    engine = engine_of(model, optimizer, stage, "fp32", {"fp16": fp16})
    taken = 0
    while taken < 3:
        take_steps(engine, range(taken, taken + 1))
        taken = engine.global_steps - engine.skipped_steps
    assert engine.skipped_steps
    found = masters(optimizer)
    engine.destroy()
    take_plain_steps(reference, kind.of(reference), range(3))
    return worst(found, reference)


@pytest.mark.parametrize(
    ("name", "stage"), quick(itertools.product(("muon", "soap"), (2, 3)), ("muon", 2), ("soap", 3))
)
def test_a_first_step_that_overflows_leaves_nothing(
    two_ranks: RankPool, name: str, stage: int
) -> None:
    assert max(two_ranks.run(with_fp16, from_an_overflow_on, name, stage)) <= KINDS[name].bound


def with_a_frozen_first_parameter(stage: int) -> float:
    """How far a group ends from plain steps if DeepSpeed does not know its first parameter."""
    kind, model, reference = KINDS["muon"], Given(), Given()
    model.get_parameter("tall").requires_grad_(False)
    optimizer = kind.of(model)
    engine = engine_of(model, optimizer, stage, "fp32", {})
    take_steps(engine, range(3))
    found = masters(optimizer)
    engine.destroy()
    assert "tall" not in found
    take_plain_steps(reference, kind.of(reference), range(3))
    return worst(found | {"tall": reference.get_parameter("tall").detach().flatten()}, reference)


def test_the_first_parameter_of_a_group_may_be_frozen(two_ranks: RankPool) -> None:
    for stage in (1, 3):
        assert max(two_ranks.run(with_a_frozen_first_parameter, stage)) <= KINDS["muon"].bound
