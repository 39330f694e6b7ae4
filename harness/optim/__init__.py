"""Optimizers and learning-rate schedules by name; APOLLO, Muon and SOAP.

The package imports only APOLLO, Muon and SOAP, so that they can be used alone (docs/optimizers.md).

    zero_compatibility.py   which optimizers are correct under ZeRO; whose state can be resharded
    build.py                an optimizer from its table in the config
    param_groups.py         parameters with settings of their own; vectors without weight decay
    registry.py             the optimizers that have a name
    scheduler.py            an engine's schedule from its table in the config
    schedules.py            the schedules that have a name
    plateau.py              a schedule that follows an evaluation
    arguments.py            arguments checked against a signature
    matrices/               Muon and SOAP, exact under every ZeRO stage; usable alone
    apollo/                 APOLLO, exact under every ZeRO stage; usable alone
    sharded/                what our optimizers share: parameters behind ZeRO's flat tensors
"""

from harness.optim.apollo import Apollo, ApolloMini, apollo_param_groups
from harness.optim.matrices import Muon, Soap, matrix_param_groups

__all__ = ["Apollo", "ApolloMini", "Muon", "Soap", "apollo_param_groups", "matrix_param_groups"]
