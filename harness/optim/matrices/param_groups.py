"""Which parameters Muon and SOAP treat as matrices, and which get dense AdamW."""

import re
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from harness.optim.sharded.param_groups import (
    DENSE,
    STACKED,
    as_groups,
    check_expressions,
    parameter_kinds,
)


def matrix_param_groups(
    model: nn.Module,
    *,
    matrices: str = "",
    dense: str = DENSE,
    stacked: str = STACKED,
    heads: Mapping[str, int] | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Parameter groups for `Muon` and `Soap`: matrices, stacks of matrices, and the rest.

    Matrices are all trainable parameters of two or more dimensions (a convolution counts as (out,
    in * kernel)), except embeddings (and heads tied to them), names that match the regular
    expression `dense`, and those with a side of 1. Names that match `matrices` always are. `heads`:
    by regular expression, into how many blocks of rows a matrix is split, like 3 for the weight of
    a fused query, key and value. `settings` apply to the matrices. Warns if there are none. Raises
    ValueError if a name in `heads` matches no matrix.
    """
    check_expressions(matrices=matrices, dense=dense, stacked=stacked)
    kinds = parameter_kinds(model, matrices=matrices, dense=dense, stacked=stacked, longest_dense=1)
    if not kinds["matrix"] and not kinds["stack"]:
        warnings.warn(
            "no parameter is a matrix: this is plain AdamW. Name some with matrices = '...'",
            stacklevel=2,
        )
    by_kind: dict[str, dict[str, Any]] = {"matrix": settings | {"dense": False}}
    if not isinstance(heads, Mapping | None):
        raise ValueError(f"heads = {heads!r} is not valid: expected a table like {{ qkv = 3 }}")
    for number, (pattern, count) in enumerate((heads or {}).items()):
        check_expressions(heads=pattern)
        split = {n: p for n, p in kinds["matrix"].items() if re.search(pattern, n)}
        if not split:
            raise ValueError(f"heads: {pattern!r} matches no matrix")
        kinds["matrix"] = {n: p for n, p in kinds["matrix"].items() if n not in split}
        kinds[f"heads {number}"] = split
        by_kind[f"heads {number}"] = settings | {"dense": False, "heads": count}
    by_kind |= {
        "stack": settings | {"dense": False, "stacked": True},
        "dense": {"dense": True},
    }
    return as_groups(kinds, by_kind)
