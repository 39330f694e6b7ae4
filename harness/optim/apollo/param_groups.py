"""Which parameters APOLLO treats as low-rank matrices, and which get dense AdamW."""

import re
import warnings
from math import prod
from typing import Any

from torch import Tensor, nn

from harness.zero.parameters import full_shape

DENSE = r"(^|\.)(\w*embed\w*|wte|wpe|\w*head|classifier|score|\w*norm\w*)(\.|$)"
"""Matches in the names of dense parameters: embeddings, heads and norms."""

STACKED = r"(^|\.)experts(\.|$)"
"""Matches in the names of 3-D parameters that are stacks of matrices: experts."""


def apollo_param_groups(
    model: nn.Module,
    *,
    rank: int,
    low_rank: str = "",
    dense: str = DENSE,
    stacked: str = STACKED,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Parameter groups for `Apollo`: matrices of rank `rank`, stacks of matrices, and the rest.

    Low-rank are all trainable parameters of two or more dimensions (a convolution counts as
    (out, in * kernel)), except embeddings (and heads tied to them), names that match the regular
    expression `dense`, and matrices whose shorter side is at most `rank`, which a sketch would not
    make smaller. Names that match `low_rank` are always low-rank. `settings` apply to the low-rank
    groups. Warns if nothing is low-rank.
    """
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    tables = {id(module.weight) for module in embeddings}

    def kind(name: str, parameter: Tensor) -> str:
        shape = full_shape(parameter)
        is_stack = len(shape) == 3 and re.search(stacked, name) is not None
        sides = shape[1:] if is_stack else shape
        if len(sides) < 2 or not prod(sides):
            return "dense"
        is_chosen = bool(low_rank) and re.search(low_rank, name) is not None
        if not is_chosen and (
            id(parameter) in tables
            or re.search(dense, name)
            or min(sides[0], prod(sides[1:])) <= rank
        ):
            return "dense"
        return "stack" if is_stack else "matrix"

    by_kind: dict[str, dict[str, Tensor]] = {"matrix": {}, "stack": {}, "dense": {}}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            by_kind[kind(name, parameter)][name] = parameter
    if not by_kind["matrix"] and not by_kind["stack"]:
        warnings.warn(
            f"no parameter is low-rank at rank = {rank}: this is plain AdamW. Choose a rank below "
            "the shorter sides of the matrices, or name some with low_rank = '...'",
            stacklevel=2,
        )
    of_kind: dict[str, dict[str, Any]] = {
        "matrix": settings | {"rank": rank},
        "stack": settings | {"rank": rank, "stacked": True},
        "dense": {"rank": 0},
    }
    return [
        {"params": list(named.values()), "param_names": list(named), **of_kind[key]}
        for key, named in by_kind.items()
        if named
    ]
