"""APOLLO and APOLLO-Mini, exact under every ZeRO stage."""

from harness.optim.apollo.groups import apollo_param_groups
from harness.optim.apollo.optimizer import Apollo, ApolloMini

__all__ = ["Apollo", "ApolloMini", "apollo_param_groups"]
