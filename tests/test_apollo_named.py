"""APOLLO's state by name: from one number of ranks and ZeRO stage to another, and from AdamW."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness import distributed
from harness.io import load, save
from harness.optim import Apollo
from harness.testing.pool import RankPool
from tests.given_gradients import (
    SHAPES,
    Given,
    apollo,
    engine_of,
    gradients_of,
    masters,
    take_plain_steps,
    take_steps,
    worst,
)

LEFT, STEPS = 16, 40  # P is refreshed every 15 steps: once before, once after
Layout = tuple[int, int]
Pools = Callable[[int], RankPool]


@pytest.fixture(scope="module")
def pools(two_ranks: RankPool, four_ranks: RankPool) -> Iterator[Pools]:
    with RankPool(1) as one_rank:
        yield {1: one_rank, 2: two_ranks, 4: four_ranks}.__getitem__


def leave(directory: Path, stage: int, mini: bool, projection: str) -> None:
    """Steps up to LEFT, and writes weights and the state by name."""
    model = Given()
    optimizer = apollo(model, mini, projection=projection)
    engine = engine_of(model, optimizer, stage, "fp32", {})
    take_steps(engine, range(LEFT))
    weights, state = masters(optimizer), optimizer.named_state()
    if distributed.is_global_leader():
        save(weights, directory / "weights.sft")
        save(state, directory / "moments.sft")
    distributed.barrier()
    engine.destroy()


def go_on(directory: Path, stage: int, mini: bool, projection: str) -> tuple[float, float]:
    """Steps from there to STEPS; the difference to an unsharded run of all steps, and how far the
    state taken up is from that which was left."""
    model, reference = Given(), Given()
    weights, state = load(directory / "weights.sft"), load(directory / "moments.sft")
    for name, parameter in model.named_parameters():
        parameter.data.copy_(weights[name].view(parameter.shape))
    optimizer = apollo(model, mini, projection=projection)
    engine = engine_of(model, optimizer, stage, "fp32", {})
    optimizer.load_named_state(state)
    assert optimizer.named_state().keys() == state.keys()
    nothing = {n: torch.full(shape, torch.nan) for n, shape in SHAPES.items()}
    if not stage:  # DeepSpeed skips it above: a step that changes nothing takes the state up
        engine.backward(engine(nothing))
        engine.step()
        taken = optimizer.named_state()
        for key, value in state.items():
            assert torch.equal(taken[key], value + key.endswith("/calls")), key
        optimizer.load_named_state(state)
    take_steps(engine, range(LEFT, STEPS))
    take_plain_steps(
        reference, plain := apollo(reference, mini, projection=projection), range(STEPS)
    )
    found = masters(optimizer)
    ends = optimizer.named_state()
    engine.destroy()
    apart = [
        float((ends[key] - value).abs().max() / value.abs().max().clamp(min=1e-30))
        for key, value in plain.named_state().items()
    ]
    return worst(found, reference), max(apart)


LAYOUTS = [((2, 1), (1, 0)), ((2, 2), (4, 2)), ((2, 1), (2, 3)), ((4, 3), (2, 1)), ((2, 3), (1, 3))]


@pytest.mark.parametrize(
    ("before", "after", "mini", "projection"),
    [
        *((*layouts, mini, "gaussian") for layouts in LAYOUTS for mini in (False, True)),
        ((2, 1), (4, 3), False, "svd"),
        ((4, 3), (1, 0), False, "svd"),
    ],
)
def test_state_moves_to_another_layout(
    pools: Pools, tmp_path: Path, before: Layout, after: Layout, mini: bool, projection: str
) -> None:
    pools(before[0]).run(leave, tmp_path, before[1], mini, projection)
    for difference, apart in pools(after[0]).run(go_on, tmp_path, after[1], mini, projection):
        assert difference <= 5e-7
        assert apart <= 1e-5


def test_adamw_warms_up_the_dense_part(caplog: pytest.LogCaptureFixture) -> None:
    model = Given({"matrix": (12, 8), "bias": (7,)})
    parameters = dict(model.named_parameters())
    adamw = torch.optim.AdamW(parameters.values(), lr=1e-2, fused=True)
    take_plain_steps(model, adamw, range(5), {"matrix": (12, 8), "bias": (7,)})
    warm: dict[str, Tensor] = {
        f"{name}/{key}": value
        for name, parameter in parameters.items()
        for key, value in adamw.state[parameter].items()
    }
    groups = [
        {"params": [nn.Parameter(p.detach().clone())], "param_names": [name], "rank": rank}
        for (name, p), rank in zip(parameters.items(), (2, 0), strict=True)
    ]
    optimizer: Any = Apollo(groups, lr=1e-2, eps=1e-8, weight_decay=1e-2)
    optimizer.load_named_state(warm)
    with pytest.raises(RuntimeError, match="taken up by the next step"):
        optimizer.state_dict()
    last = gradients_of(9, {"matrix": (12, 8), "bias": (7,)})
    (matrix,), (bias,) = (group["params"] for group in optimizer.param_groups)
    for ours, (name, theirs) in zip((matrix, bias), parameters.items(), strict=True):
        ours.grad = theirs.grad = last[name]
    with caplog.at_level(logging.WARNING):
        optimizer.step()
    adamw.step()
    assert "matrix: its state is not that of APOLLO at this rank; it starts anew" in caplog.text
    assert torch.equal(bias, parameters["bias"])
    assert [int(optimizer.state[p]["step"]) for p in (matrix, bias)] == [1, 6]
