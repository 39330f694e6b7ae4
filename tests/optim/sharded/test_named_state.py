"""The state of sharded optimizers by name: from one number of ranks and ZeRO stage to another."""

import itertools
from pathlib import Path

import pytest
import torch

from harness import distributed
from harness.io import load, save
from harness.optim import Apollo
from tests.support.given_gradients import (
    SHAPES,
    Given,
    engine_of,
    masters,
    take_steps,
    worst,
)
from tests.support.helpers import Pools
from tests.support.quick import quick
from tests.support.sharded_optimizers import KINDS

LEFT, STEPS = 17, 40
"""APOLLO's P and SOAP's bases are refreshed every 15 steps: once before, once after."""
Layout = tuple[int, int]


def save_part_way(directory: Path, stage: int, name: str) -> None:
    """Steps up to LEFT, and writes weights and the state by name."""
    model = Given()
    optimizer = KINDS[name].of(model)
    engine = engine_of(model, optimizer, stage, "fp32", {})
    take_steps(engine, range(LEFT))
    weights, state = masters(optimizer), optimizer.named_state()
    if distributed.is_global_leader():
        save(weights, directory / "weights.sft")
        save(state, directory / "moments.sft")
    distributed.barrier()
    engine.destroy()


def resume(directory: Path, stage: int, name: str) -> tuple[float, float]:
    """Steps from there to STEPS; the difference to an unsharded run of all steps, of the weights
    and of the state."""
    model = Given()
    weights, state = load(directory / "weights.sft"), load(directory / "moments.sft")
    for key, parameter in model.named_parameters():
        parameter.data.copy_(weights[key].view(parameter.shape))
    optimizer = KINDS[name].of(model)
    engine = engine_of(model, optimizer, stage, "fp32", {})
    optimizer.load_named_state(state)
    assert optimizer.named_state().keys() == state.keys()
    if isinstance(optimizer, Apollo) and not stage:  # DeepSpeed skips it above
        # A step that changes nothing takes the state.
        engine.backward(engine({n: torch.full(shape, torch.nan) for n, shape in SHAPES.items()}))
        engine.step()
        taken = optimizer.named_state()
        for key, value in state.items():
            assert torch.equal(taken[key], value + key.endswith("/calls")), key
        optimizer.load_named_state(state)
    take_steps(engine, range(LEFT, STEPS))
    found, ends = masters(optimizer), optimizer.named_state()
    engine.destroy()
    reference, unsharded = KINDS[name].unsharded(STEPS)
    expected = unsharded.named_state()
    assert ends.keys() == expected.keys()
    apart = [
        float((ends[key] - value).abs().max() / value.abs().max().clamp(min=1e-30))
        for key, value in expected.items()
    ]
    return worst(found, reference), max(apart)


LAYOUTS: list[tuple[Layout, Layout]] = [
    ((2, 1), (1, 0)),
    ((2, 1), (2, 3)),
    ((2, 1), (4, 3)),
    ((2, 2), (4, 2)),
    ((2, 3), (1, 0)),
    ((2, 3), (1, 3)),
    ((4, 3), (1, 0)),
    ((4, 3), (2, 1)),
]


@pytest.mark.parametrize(
    ("name", "layouts"),
    quick(
        itertools.product(KINDS, LAYOUTS),
        ("apollo", ((2, 1), (1, 0))),
        ("apollo-mini", ((2, 2), (4, 2))),
        ("apollo-mini", ((4, 3), (2, 1))),
        ("apollo, svd", ((2, 1), (4, 3))),
        ("muon", ((2, 1), (2, 3))),
        ("soap", ((2, 1), (2, 3))),
    ),
    ids=str,
)
def test_state_moves_to_another_layout(
    pools: Pools, tmp_path: Path, name: str, layouts: tuple[Layout, Layout]
) -> None:
    before, after = layouts
    pools(before[0]).run(save_part_way, tmp_path, before[1], name)
    for difference, apart in pools(after[0]).run(resume, tmp_path, after[1], name):
        assert difference <= KINDS[name].bound
        assert apart <= 1e-5
