"""Which parameters are matrices, which are stacks of them, and which get dense AdamW."""

import re
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

from torch import Tensor, nn

from harness.zero.parameters import full_shape

DENSE = r"(^|\.)(\w*embed\w*|wte|wpe|\w*head|classifier|score|\w*norm\w*)(\.|$)"
"""Matches in the names of dense parameters: embeddings, heads and norms."""

STACKED = r"(^|\.)experts(\.|$)"
"""Matches in the names of 3-D parameters that are stacks of matrices: experts."""

Kinds = dict[str, dict[str, Tensor]]
"""Parameters by name, by kind: "matrix", "stack", "dense"."""


def parameter_kinds(
    model: nn.Module, *, matrices: str, dense: str, stacked: str, longest_dense: int
) -> Kinds:
    """The trainable parameters of a model by kind, in its order.

    Matrices are all parameters of two or more dimensions (a convolution counts as (out, in *
    kernel)), except embeddings (and heads tied to them), names that match the regular expression
    `dense`, and those whose shorter side is at most `longest_dense`. Names that match `matrices`
    always are. A 3-D parameter whose name matches `stacked` is a stack of matrices.
    """
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    tables = {id(module.weight) for module in embeddings}

    def kind(name: str, parameter: Tensor) -> str:
        shape = full_shape(parameter)
        is_stack = len(shape) == 3 and re.search(stacked, name) is not None
        sides = shape[1:] if is_stack else shape
        if len(sides) < 2 or not prod(shape):
            return "dense"
        is_chosen = bool(matrices) and re.search(matrices, name) is not None
        if not is_chosen and (
            id(parameter) in tables
            or re.search(dense, name)
            or min(sides[0], prod(sides[1:])) <= longest_dense
        ):
            return "dense"
        return "stack" if is_stack else "matrix"

    kinds: Kinds = {"matrix": {}, "stack": {}, "dense": {}}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kinds[kind(name, parameter)][name] = parameter
    return kinds


def check_expressions(**settings: Any) -> None:
    """Raises ValueError for a setting that is not a regular expression."""
    for key, expression in settings.items():
        try:
            re.compile(expression)
        except (re.error, TypeError) as error:
            text = f"{key} = {expression!r} is not a regular expression: {error}"
            raise ValueError(text) from None


def as_groups(kinds: Kinds, settings: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Torch's parameter groups, with `settings` by kind."""
    return [
        {"params": list(named.values()), "param_names": list(named), **settings[kind]}
        for kind, named in kinds.items()
        if named
    ]


def split_by_kind(
    groups: list[dict[str, Any]], kinds_of: Callable[[dict[str, Any]], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Groups whose `params` are by name, each split as the groups of the entire model that
    `kinds_of` returns for it."""
    split = []
    for group in groups:
        for kind in kinds_of(group):
            names = set(kind["param_names"])
            named = {name: p for name, p in group["params"].items() if name in names}
            if named:
                own = {key: value for key, value in kind.items() if key != "param_names"}
                split.append(group | own | {"params": named})
    return split
