"""Optimizers and learning-rate schedules by name, and APOLLO.

The package imports only APOLLO, so that it can be used alone (docs/apollo.md).

    zero_compatibility.py   which optimizers are correct under ZeRO; whose state can be resharded
    build.py                an optimizer from its table in the config
    param_groups.py         parameters with settings of their own; vectors without weight decay
    registry.py             the optimizers that have a name
    scheduler.py            an engine's schedule from its table in the config
    schedules.py            the schedules that have a name
    plateau.py              a schedule that follows an evaluation
    arguments.py            arguments checked against a signature
    apollo/                 APOLLO, exact under every ZeRO stage; usable alone
"""

from harness.optim.apollo import Apollo, ApolloMini, apollo_param_groups

__all__ = ["Apollo", "ApolloMini", "apollo_param_groups"]
