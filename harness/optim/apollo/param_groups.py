"""Which parameters APOLLO treats as low-rank matrices, and which get dense AdamW."""

import warnings
from typing import Any

from torch import nn

from harness.optim.sharded.param_groups import (
    DENSE,
    STACKED,
    as_groups,
    check_expressions,
    parameter_kinds,
)


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
    check_expressions(low_rank=low_rank, dense=dense, stacked=stacked)
    kinds = parameter_kinds(
        model, matrices=low_rank, dense=dense, stacked=stacked, longest_dense=rank
    )
    if not kinds["matrix"] and not kinds["stack"]:
        warnings.warn(
            f"no parameter is low-rank at rank = {rank}: this is plain AdamW. Choose a rank below "
            "the shorter sides of the matrices, or name some with low_rank = '...'",
            stacklevel=2,
        )
    by_kind = {
        "matrix": settings | {"rank": rank},
        "stack": settings | {"rank": rank, "stacked": True},
        "dense": {"rank": 0},
    }
    return as_groups(kinds, by_kind)
