"""The state of Muon and SOAP by name, from another method, and their state dicts."""

import logging
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from harness.optim import Muon, Soap


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
