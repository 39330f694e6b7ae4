"""Optimizers of matrices, exact under every ZeRO stage: Muon.

Usable alone: imports torch and, from harness, only `harness.optim` and `harness.zero`'s partition,
shards and parameters.

    muon.py            Muon: the equations, and Newton-Schulz
    optimizer.py       a step: pieces of matrices to their owners, updates back
    param_groups.py    which parameters are matrices
    groups.py          matrices that are computed together, in batches
    exchange.py        the collectives of a step
    plan.py            which rank computes which matrix
"""

from harness.optim.matrices.muon import Muon
from harness.optim.matrices.param_groups import matrix_param_groups

__all__ = ["Muon", "matrix_param_groups"]
