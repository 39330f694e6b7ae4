"""Matrix optimizers on several ranks: what they send, and that all ranks do the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from harness import distributed
from harness.optim.matrices import exchange
from harness.optim.matrices.memory import sent_bytes, state_bytes
from harness.testing.pool import RankPool
from tests.support.given_gradients import (
    Given,
    engine_of,
    gradients_of,
    masters,
    take_plain_steps,
    take_steps,
    worst,
)
from tests.support.matrix_optimizers import muon, soap

OPTIMIZERS = pytest.mark.parametrize("make", [muon, soap], ids=lambda make: make.__name__)
MODULES = ("groups", "optimizer", "muon")


class Waits(TorchDispatchMode):
    """Counts the operations that make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.partition(".")[0] in ("_local_scalar_dense", "is_nonzero", "nonzero"):
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


def what_a_step_does(
    make: Callable[..., Any], stage: int, overrides: dict[str, Any]
) -> tuple[list[list[int]], list[str], int, int]:
    """The bytes that each collective of each step() sends to other ranks, the waits once the layout
    is known, the fewest bytes possible for these owners, and those that `sent_bytes` says: on the
    way that devices go."""
    model = Given()
    optimizer = make(model)
    world = distributed.world_size()
    computed = sent_bytes(optimizer.param_groups, stage, world, 4)[distributed.global_rank()]
    engine = engine_of(model, optimizer, stage, "bf16" if overrides else "fp32", overrides)
    take_steps(engine, range(2))
    calls: list[list[int]] = []
    waits = Waits()
    step, all_to_all, rank = type(optimizer).step, dist.all_to_all_single, dist.get_rank()

    def watched(self: Any) -> None:
        calls.append([])
        with waits:
            step(self)

    def counted(output: Any, sent: Any, ins: Any, outs: list[int], group: Any) -> None:
        calls[-1].append((sum(outs) - outs[rank]) * sent.element_size())
        all_to_all(output, sent, ins, outs, group=group)

    def unexpected(*_: Any, **__: Any) -> None:
        raise AssertionError("another collective in a step")

    with pytest.MonkeyPatch.context() as patch:
        for module in MODULES:
            patch.setattr(f"harness.optim.matrices.{module}.may_branch", lambda _: False)
        patch.setattr(optimizer, "step", watched.__get__(optimizer))
        engine.backward(engine(gradients_of(2)))
        patch.setattr(exchange.dist, "all_to_all_single", counted)
        engine.step()
    plans = [
        plan for group in optimizer._tensor_groups.values() for plan in getattr(group, "plans", [])
    ]
    there = sum(p.length for plan in plans for p in plan.held if p.owner != rank)
    back = sum(p.length for plan in plans for p in plan.owned if p.holder != rank)
    engine.destroy()
    return calls, waits.found, 4 * (there + back), computed


@OPTIMIZERS
@pytest.mark.parametrize(
    ("stage", "overrides", "calls"),
    [(1, {}, 5), (3, {}, 5), (1, {"data_types": {"grad_accum_dtype": "fp32"}}, 1)],
)
def test_two_collectives_few_bytes_and_no_wait(
    two_ranks: RankPool, stage: int, overrides: dict[str, Any], calls: int, make: Callable[..., Any]
) -> None:
    """Beyond the pieces of matrices, a step() sends one number to each other rank."""
    for seen, waits, least, computed in two_ranks.run(what_a_step_does, make, stage, overrides):
        assert len(seen) == calls
        assert all(1 <= len(step) <= 2 for step in seen)
        assert sum(map(sum, seen)) == least + 4 * calls
        assert 4 * calls <= 0.05 * least
        assert waits == []
        if not overrides:  # DeepSpeed's default layout
            assert computed == least


def measured_and_computed(make: Callable[..., Any], stage: int) -> tuple[int, int]:
    """This rank's bytes of state after a step, and what `state_bytes` says of it before."""
    model = Given()
    optimizer = make(model)
    computed = state_bytes(optimizer.param_groups, stage, distributed.world_size())
    engine = engine_of(model, optimizer, stage, "fp32", {})
    take_steps(engine, range(1))
    values = [value for state in optimizer.state.values() for value in state.values()]
    engine.destroy()
    measured = sum(value.nbytes for value in values if isinstance(value, torch.Tensor))
    return measured, computed[distributed.global_rank()]


@OPTIMIZERS
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_state_takes_as_many_bytes_as_is_computed(
    two_ranks: RankPool, stage: int, make: Callable[..., Any]
) -> None:
    for measured, computed in two_ranks.run(measured_and_computed, make, stage):
        assert measured == computed


def poisoned_on_one_rank(make: Callable[..., Any]) -> tuple[float, float]:
    """A NaN on rank 1 only, in a step that DeepSpeed does not check itself: how far the masters
    moved in it; and how far they end from a run without that step."""
    unchecked = {"bf16": {"enabled": True, "check_grad_overflow": False}}
    model, reference = Given(), Given()
    optimizer = make(model)
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
    plain = make(reference)
    take_plain_steps(reference, plain, range(3))
    take_plain_steps(reference, plain, range(4, 8))
    found = masters(optimizer)
    engine.destroy()
    moved = max(float((after[name] - before[name]).abs().max()) for name in before)
    return moved, worst(found, reference)


@OPTIMIZERS
def test_a_non_finite_gradient_on_one_rank_skips_the_step_on_all(
    two_ranks: RankPool, make: Callable[..., Any]
) -> None:
    for moved, difference in two_ranks.run(poisoned_on_one_rank, make):
        assert moved == 0.0
        assert difference <= 2e-6
