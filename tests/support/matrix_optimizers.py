"""Muon and SOAP for the model of `given_gradients`: blocks, stacks, convolutions, and AdamW."""

from typing import Any

from torch import nn

from harness.optim import Muon, Soap
from harness.optim.matrices.optimizer import MatrixOptimizer


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups of matrices, one of blocks of rows, stacked experts, and a dense group."""
    named = dict(model.named_parameters())

    def group(*names: str, **options: Any) -> dict[str, Any]:
        return {"params": [named[n] for n in names], "param_names": list(names), **options}

    return [
        group("tall", "wide", "long"),
        group("square", heads=3),
        group("kernel", lr=3e-3, weight_decay=0.0),
        group("experts", stacked=True),
        group("table", "bias", dense=True),
    ]


def muon(model: nn.Module, _: bool = False, **settings: Any) -> MatrixOptimizer:
    settings = {"lr": 1e-2, "weight_decay": 0.1} | settings
    return Muon(groups_of(model), **settings)


def soap(model: nn.Module, _: bool = False, **settings: Any) -> MatrixOptimizer:
    """Two refreshes of the bases in 40 steps, and a side without one."""
    defaults = {"lr": 1e-2, "weight_decay": 0.1, "max_precond_dim": 40}
    settings = defaults | {"precondition_frequency": 15} | settings
    return Soap(groups_of(model), **settings)
