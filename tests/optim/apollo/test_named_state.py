"""APOLLO's state by name, from AdamW, and where parameters or groups change."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.optim import Apollo
from harness.testing.pool import RankPool
from tests.support.given_gradients import (
    Given,
    engine_of,
    gradients_of,
    take_plain_steps,
    take_steps,
)


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
