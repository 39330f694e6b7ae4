"""What every sharded optimizer does in a plain loop, without ZeRO."""

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.optim import Apollo, Muon, Soap

DENSE: dict[str, dict[str, Any]] = {"Apollo": {"rank": 0}}


def optimizer_of(kind: Any, of_groups: dict[str, Any] | None = None, **settings: Any) -> Any:
    """Of a matrix, a stack and a vector, which are the same each time. `of_groups`: settings of
    their groups, by name."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"matrix": (6, 4), "stack": (2, 6, 4), "vector": (5,)}
    named = {n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in shapes.items()}
    options = {"stack": {"stacked": True}, "vector": DENSE.get(kind.__name__, {"dense": True})}
    settings = ({"rank": 2} if kind is Apollo else {}) | settings
    return kind(
        [
            {
                "params": [p],
                "param_names": [n],
                **options.get(n, {}),
                **(of_groups or {}).get(n, {}),
            }
            for n, p in named.items()
        ],
        **settings,
    )


def parameters_of(optimizer: Any) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def step(optimizer: Any, *steps: int) -> None:
    for number in steps:
        generator = torch.Generator().manual_seed(number)
        for parameter in parameters_of(optimizer):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


KINDS = pytest.mark.parametrize("kind", [Apollo, Muon, Soap])


@KINDS
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_takes_the_same_steps(kind: Any, copied: Callable[[Any], Any]) -> None:
    optimizer = optimizer_of(kind, lr=0.1)
    step(optimizer, 0, 1, 2)
    other = copied(optimizer)
    for each in (optimizer, other):
        step(each, 3, 4)
    pairs = zip(parameters_of(optimizer), parameters_of(other), strict=True)
    assert all(a is not b and torch.equal(a, b) for a, b in pairs)
    assert other.named_state().keys() == optimizer.named_state().keys()


@pytest.mark.parametrize("kind", [Muon, Soap])
def test_plans_of_other_sets_of_gradients_are_forgotten(kind: Any) -> None:
    """A branch that every other step leaves out."""
    first, second = matrices = [nn.Parameter(torch.eye(4)) for _ in range(2)]
    optimizer = kind(matrices)
    for number in range(6):
        first.grad = torch.ones_like(first)
        second.grad = torch.ones_like(second) if number % 2 else None
        optimizer.step()
    assert len(optimizer._exchanges) == 1


BLOCKS, ENTIRE, DENSE_STACK = (
    {"matrix": {"heads": 3}},
    {"stack": {"stacked": False}},
    {"stack": {"stacked": False, "dense": True}},
)


@pytest.mark.parametrize(
    ("before", "after", "reset"),
    [
        ((Soap,), (Soap, BLOCKS), "matrix"),
        ((Soap, BLOCKS), (Soap,), "matrix"),
        ((Soap, ENTIRE), (Soap,), "stack"),
        ((Soap, ENTIRE), (Soap, DENSE_STACK), "stack"),
        ((Soap, ENTIRE), (Apollo,), "stack"),
        ((Soap, DENSE_STACK), (Soap,), "stack"),
        ((Muon,), (Soap,), "stack"),
        ((Apollo,), (Soap,), "matrix"),
    ],
)
def test_loaded_state_of_another_method_or_of_other_matrices_is_dropped(
    before: Any, after: Any, reset: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It says so; and nothing of it is left to wait for, or kept for the next one."""
    source, optimizer, fresh = (optimizer_of(*what) for what in (before, after, after))
    step(source, 0, 1)
    optimizer.load_named_state(source.named_state())
    with caplog.at_level(logging.WARNING):
        step(optimizer, 2)
    step(fresh, 2)
    assert f"{reset}: reset: the loaded state is not" in caplog.text
    assert optimizer.named_state().keys() == fresh.named_state().keys()
    assert optimizer.state_dict()["state"].keys() == fresh.state_dict()["state"].keys()
    names = [name for group in fresh.param_groups for name in group["param_names"]]
    pairs = zip(names, parameters_of(optimizer), parameters_of(fresh), strict=True)
    assert all(torch.equal(a, b) for name, a, b in pairs if name == reset)
