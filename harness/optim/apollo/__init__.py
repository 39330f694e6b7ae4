"""APOLLO: AdamW's step sizes from a low-rank sketch of the gradient, exact under every ZeRO stage.

Usable alone: imports torch and, from harness, only `devices` and `harness.zero`'s partition, shards
and parameters.

    optimizer.py       Apollo, ApolloMini: the equations, and a step
    exchange.py        the collectives of a step
    lowrank.py         the step of low-rank matrices
    kernels.py         Triton kernels, of `fused = true`
    projections.py     random P, regenerated when needed
    spectral.py        P from the gradient's singular vectors
    named_state.py     state by matrix name: moves it between layouts
    tensor_groups.py   tensors that are stepped together
    memory.py          bytes of state per rank, computed from shapes
    channels.py        which rank keeps the state of which rows and columns
    philox.py          counter-based random numbers
    param_groups.py    which parameters are low-rank
"""

from harness.optim.apollo.optimizer import Apollo, ApolloMini
from harness.optim.apollo.param_groups import apollo_param_groups

__all__ = ["Apollo", "ApolloMini", "apollo_param_groups"]
