"""Optimizers of matrices, exact under every ZeRO stage: Muon and SOAP.

Usable alone: imports torch and, from harness, only `harness.optim` and `harness.zero`'s partition,
shards and parameters.

    memory.py          bytes of state, and bytes sent, computed from shapes
    muon.py            Muon: the equations, and Newton-Schulz
    soap.py            SOAP: the equations
    soap_state.py      SOAP's state, by flat and by matrix name
    optimizer.py       a step: pieces of matrices to their owners, updates back
    param_groups.py    which parameters are matrices
    groups.py          matrices that are computed together, in batches
    exchange.py        the collectives of a step
    plan.py            which rank computes which matrix
"""

from harness.optim.matrices.muon import Muon
from harness.optim.matrices.param_groups import matrix_param_groups
from harness.optim.matrices.soap import Soap

__all__ = ["Muon", "Soap", "matrix_param_groups"]
