"""Matrix optimizers on several ranks: what they send, and that all ranks do the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from harness import distributed
from harness.optim.matrices import exchange
from harness.optim.matrices.memory import sent_bytes
from harness.testing.pool import RankPool
from tests.support.given_gradients import (
    Given,
    engine_of,
    gradients_of,
    take_steps,
)
from tests.support.matrix_optimizers import muon, soap
from tests.support.waits import Waits

OPTIMIZERS = pytest.mark.parametrize("make", [muon, soap], ids=lambda make: make.__name__)
MODULES = ("groups", "optimizer", "muon")


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
