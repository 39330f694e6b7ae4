"""Optimizers and learning-rate schedules by name, and APOLLO.

The package imports only APOLLO, so that it can be used alone (docs/apollo.md).

    zero_compatibility.py   which optimizers are correct under ZeRO; whose state can be resharded
    build.py                an optimizer from its table in the config
    registry.py             the optimizers that have a name
    schedules.py            learning-rate schedules
    arguments.py            arguments checked against a signature
    apollo/                 APOLLO, exact under every ZeRO stage; usable alone
"""

from harness.optim.apollo import Apollo, ApolloMini, apollo_param_groups

__all__ = ["Apollo", "ApolloMini", "apollo_param_groups"]
