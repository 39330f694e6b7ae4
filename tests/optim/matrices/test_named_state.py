"""Muon's and SOAP's state by name: from one number of ranks and ZeRO stage to another."""

import logging
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness import distributed
from harness.io import load, save
from harness.optim import Muon, Soap
from tests.support.given_gradients import (
    Given,
    engine_of,
    masters,
    plain,
    take_steps,
    worst,
)
from tests.support.helpers import Pools
from tests.support.matrix_optimizers import muon, soap

LEFT, STEPS = 17, 40  # SOAP's bases are refreshed at steps 15 and 30
Layout = tuple[int, int]
Make = Callable[..., Any]


def save_part_way(directory: Path, stage: int, make: Make) -> None:
    """Steps up to LEFT, and writes weights and the state by name."""
    model = Given()
    optimizer = make(model)
    engine = engine_of(model, optimizer, stage, "fp32", {})
    take_steps(engine, range(LEFT))
    weights, state = masters(optimizer), optimizer.named_state()
    if distributed.is_global_leader():
        save(weights, directory / "weights.sft")
        save(state, directory / "moments.sft")
    distributed.barrier()
    engine.destroy()


def resume(directory: Path, stage: int, make: Make) -> tuple[float, float]:
    """Steps from there to STEPS; the difference to an unsharded run of all steps, of the weights
    and of the state."""
    model = Given()
    weights, state = load(directory / "weights.sft"), load(directory / "moments.sft")
    for name, parameter in model.named_parameters():
        parameter.data.copy_(weights[name].view(parameter.shape))
    optimizer = make(model)
    engine = engine_of(model, optimizer, stage, "fp32", {})
    optimizer.load_named_state(state)
    assert optimizer.named_state().keys() == state.keys()
    take_steps(engine, range(LEFT, STEPS))
    found, ends = masters(optimizer), optimizer.named_state()
    engine.destroy()
    reference, unsharded = plain(make, False, STEPS)
    expected = unsharded.named_state()
    assert ends.keys() == expected.keys()
    apart = [
        float((ends[key] - value).abs().max() / value.abs().max().clamp(min=1e-30))
        for key, value in expected.items()
    ]
    return worst(found, reference), max(apart)


LAYOUTS: list[tuple[Layout, Layout]] = [
    ((2, 1), (2, 3)),
    ((2, 3), (1, 0)),
    ((2, 2), (4, 2)),
    ((4, 3), (2, 1)),
]


@pytest.mark.parametrize("make", [muon, soap], ids=lambda make: make.__name__)
@pytest.mark.parametrize(
    ("before", "after"),
    [LAYOUTS[0], *(pytest.param(*layouts, marks=pytest.mark.slow) for layouts in LAYOUTS[1:])],
)
def test_state_moves_to_another_layout(
    pools: Pools, tmp_path: Path, before: Layout, after: Layout, make: Make
) -> None:
    pools(before[0]).run(save_part_way, tmp_path, before[1], make)
    for difference, apart in pools(after[0]).run(resume, tmp_path, after[1], make):
        assert difference <= 2e-6
        assert apart <= 1e-5


def stepped(kind: Any, **settings: Any) -> Any:
    parameters = [nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(5))]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "dense": True}]
    optimizer = kind(groups, **settings)
    for parameter in parameters:
        parameter.grad = torch.arange(parameter.numel()).view(parameter.shape).sin()
    return optimizer


def test_state_of_another_method_is_reset_and_that_of_adamw_kept(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """AdamW's moments of a matrix are neither a momentum nor in SOAP's bases."""
    before = stepped(Soap)
    before.step()
    state = before.named_state()
    for kind, other in ((Muon, before), (Soap, stepped(Muon))):
        if kind is Soap:
            other.step()
        after = stepped(kind)
        after.load_named_state(other.named_state() if kind is Soap else state)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            after.step()
        assert "0.0: reset: the loaded state is not" in caplog.text
        matrix, vector = (p for group in after.param_groups for p in group["params"])
        assert int(after.state[vector]["step"]) == 2
        assert int(after.state[matrix]["step"]) == (1 if kind is Muon else 0)
        after.state_dict()


@pytest.mark.parametrize("kind", [Muon, Soap])
def test_a_state_dict_continues_to_the_bit(kind: Any) -> None:
    first, second = stepped(kind), stepped(kind)
    for _ in range(13):
        first.step()
    weights = [p.detach().clone() for group in first.param_groups for p in group["params"]]
    saved = deepcopy(first.state_dict())  # which refers to the live tensors
    first.step()
    ours = [p for group in second.param_groups for p in group["params"]]
    for parameter, weight in zip(ours, weights, strict=True):
        parameter.data.copy_(weight)
    second.load_state_dict(saved)
    second.step()
    theirs = [p for group in first.param_groups for p in group["params"]]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
