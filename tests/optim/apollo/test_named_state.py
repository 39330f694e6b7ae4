"""APOLLO's state by name: from one number of ranks and ZeRO stage to another, and from AdamW."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness import distributed
from harness.io import load, save
from harness.optim import Apollo
from harness.testing.pool import RankPool
from tests.support.given_gradients import (
    SHAPES,
    Given,
    apollo,
    engine_of,
    gradients_of,
    masters,
    plain,
    take_plain_steps,
    take_steps,
    worst,
)
from tests.support.helpers import Pools
from tests.support.quick import quick

LEFT, STEPS = 16, 40  # P is refreshed every 15 steps: once before, once after
Layout = tuple[int, int]


def save_part_way(directory: Path, stage: int, mini: bool, projection: str) -> None:
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


def resume(directory: Path, stage: int, mini: bool, projection: str) -> tuple[float, float]:
    """Steps from there to STEPS; the difference to an unsharded run of all steps, and how far the
    resumed state is from the saved one."""
    model = Given()
    weights, state = load(directory / "weights.sft"), load(directory / "moments.sft")
    for name, parameter in model.named_parameters():
        parameter.data.copy_(weights[name].view(parameter.shape))
    optimizer = apollo(model, mini, projection=projection)
    engine = engine_of(model, optimizer, stage, "fp32", {})
    optimizer.load_named_state(state)
    assert optimizer.named_state().keys() == state.keys()
    nothing = {n: torch.full(shape, torch.nan) for n, shape in SHAPES.items()}
    if not stage:  # DeepSpeed skips it above: a step that changes nothing takes the state
        engine.backward(engine(nothing))
        engine.step()
        taken = optimizer.named_state()
        for key, value in state.items():
            assert torch.equal(taken[key], value + key.endswith("/calls")), key
        optimizer.load_named_state(state)
    take_steps(engine, range(LEFT, STEPS))
    found = masters(optimizer)
    ends = optimizer.named_state()
    engine.destroy()
    reference, unsharded = plain(apollo, mini, STEPS, (("projection", projection),))
    apart = [
        float((ends[key] - value).abs().max() / value.abs().max().clamp(min=1e-30))
        for key, value in unsharded.named_state().items()
    ]
    return worst(found, reference), max(apart)


LAYOUTS = [((2, 1), (1, 0)), ((2, 2), (4, 2)), ((2, 1), (2, 3)), ((4, 3), (2, 1)), ((2, 3), (1, 3))]


@pytest.mark.parametrize(
    ("before", "after", "mini", "projection"),
    quick(
        [
            *((*layouts, mini, "gaussian") for layouts in LAYOUTS for mini in (False, True)),
            ((2, 1), (4, 3), False, "svd"),
            ((4, 3), (1, 0), False, "svd"),
        ],
        ((2, 1), (1, 0), False, "gaussian"),
        ((2, 2), (4, 2), True, "gaussian"),
        ((4, 3), (2, 1), True, "gaussian"),
        ((2, 1), (4, 3), False, "svd"),
    ),
)
def test_state_moves_to_another_layout(
    pools: Pools, tmp_path: Path, before: Layout, after: Layout, mini: bool, projection: str
) -> None:
    pools(before[0]).run(save_part_way, tmp_path, before[1], mini, projection)
    for difference, apart in pools(after[0]).run(resume, tmp_path, after[1], mini, projection):
        assert difference <= 5e-7
        assert apart <= 1e-5


def test_adamw_warms_up_the_dense_group(caplog: pytest.LogCaptureFixture) -> None:
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
    with pytest.raises(RuntimeError, match="takes over state loaded by name at the next step"):
        optimizer.state_dict()
    last = gradients_of(9, {"matrix": (12, 8), "bias": (7,)})
    (matrix,), (bias,) = (group["params"] for group in optimizer.param_groups)
    for ours, (name, theirs) in zip((matrix, bias), parameters.items(), strict=True):
        ours.grad = theirs.grad = last[name]
    with caplog.at_level(logging.WARNING):
        optimizer.step()
    adamw.step()
    assert "matrix: reset: the loaded state is not APOLLO's at this rank" in caplog.text
    assert torch.equal(bias, parameters["bias"])
    assert [int(optimizer.state[p]["step"]) for p in (matrix, bias)] == [1, 6]


def two_matrices(**settings: Any) -> tuple[list[nn.Parameter], Apollo]:
    """Two matrices and a vector, without DeepSpeed."""
    generator = torch.Generator().manual_seed(1)
    shapes = (12, 5), (9, 4), (3,)
    given = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    groups = [{"params": given[:2], "rank": 2}, {"params": given[2:], "rank": 0}]
    return given, Apollo(groups, lr=1e-2, **settings)


def step(given: list[nn.Parameter], optimizer: Apollo, seed: int, among: range = range(3)) -> None:
    generator = torch.Generator().manual_seed(seed)
    for number, parameter in enumerate(given):
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = gradient if number in among else None
    optimizer.step()


@pytest.fixture
def named() -> dict[str, Tensor]:
    """The state after three steps."""
    given, optimizer = two_matrices()
    for seed in range(3):
        step(given, optimizer, seed)
    return optimizer.named_state()


def test_moments_are_kept_where_svd_is_new(
    named: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    """As on the same layout: P is made at once, and no moment is lost."""
    given, optimizer = two_matrices(projection="svd")
    optimizer.load_named_state(named)
    step(given, optimizer, 3)
    assert [int(optimizer.state[p]["step"]) for p in given] == [4, 4, 4]
    assert float(optimizer.state[given[0]]["projection"].abs().sum()) > 0
    assert caplog.text == ""


def test_parameters_without_a_gradient_keep_their_state_by_name(named: dict[str, Tensor]) -> None:
    given, optimizer = two_matrices()
    optimizer.load_named_state(named)
    step(given, optimizer, 3, among=range(1))
    again = optimizer.named_state()
    assert again.keys() == named.keys()
    assert all(torch.equal(again[k], v) for k, v in named.items() if not k.startswith("0.0/"))
    with pytest.raises(RuntimeError, match=r"at the next step .* Pending: 0\.1, 1\.0"):
        optimizer.state_dict()
    step(given, optimizer, 4)
    assert [int(optimizer.state[p]["step"]) for p in given] == [5, 4, 4]
    assert len(optimizer.state_dict()["state"]) == 3


def test_a_loaded_state_replaces_one_by_name(named: dict[str, Tensor]) -> None:
    given, optimizer = two_matrices()
    empty = optimizer.state_dict()
    optimizer.load_named_state(named)
    optimizer.load_state_dict(empty)
    step(given, optimizer, 3)
    assert [int(optimizer.state[p]["step"]) for p in given] == [1, 1, 1]


def test_named_state_does_not_change_the_metrics() -> None:
    given, optimizer = two_matrices()
    for seed, among in ((0, range(3)), (1, range(1))):
        step(given, optimizer, seed, among)
    metrics = optimizer.step_metrics()
    optimizer.named_state()
    assert metrics
    assert optimizer.step_metrics() == metrics


def dense_after_low_rank(stage: int) -> list[int]:
    """A matrix that was low-rank, and is dense now: what it has of a sketch is not its moments."""
    shapes = {"matrix": (12, 8), "bias": (7,)}
    model = Given(shapes)
    small = {"params": [model.matrix], "param_names": ["matrix"], "rank": 2}
    bias = {"params": [model.bias], "param_names": ["bias"], "rank": 0}
    before = Apollo([small, bias], lr=1e-2)
    take_plain_steps(model, before, range(2), shapes)
    model = Given(shapes)
    small, bias = small | {"params": [model.matrix], "rank": 0}, bias | {"params": [model.bias]}
    optimizer = Apollo([small, bias], lr=1e-2)
    optimizer.load_named_state(before.named_state())
    engine = engine_of(model, optimizer, stage, "fp32", {})
    take_steps(engine, range(1), shapes)
    found = [int(state["step"]) for state in optimizer.state.values()]
    engine.destroy()
    return found


def test_a_sketch_is_not_taken_for_dense_moments(two_ranks: RankPool) -> None:
    for stage in (0, 1):
        assert two_ranks.run(dense_after_low_rank, stage) == [[1, 3], [1, 3]]
