"""APOLLO: AdamW's step sizes from a low-rank sketch of the gradient, exact under every ZeRO stage.

Usable alone: needs torch, and of harness only `harness.zero`'s partition, shards and parameters.

    optimizer.py       Apollo, ApolloMini: the equations, and a step
    exchange.py        what the ranks send each other in a step
    lowrank.py         the steps of matrices
    projections.py     random P, made again at any time
    spectral.py        P from the gradient's singular vectors
    named_state.py     the state by the names of matrices: from one layout to another
    tensor_groups.py   the tensors that are stepped together; dense ones, with AdamW
    memory.py          bytes of state on each rank, before anything is built
    channels.py        which rank keeps the state of which rows and columns
    philox.py          random numbers by address
    param_groups.py    which parameters are low-rank
"""

from harness.optim.apollo.optimizer import Apollo, ApolloMini
from harness.optim.apollo.param_groups import apollo_param_groups

__all__ = ["Apollo", "ApolloMini", "apollo_param_groups"]
