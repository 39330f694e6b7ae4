"""Optimizers by name, learning-rate schedules, and APOLLO."""

from harness.optim.apollo import Apollo, ApolloMini, apollo_param_groups

__all__ = ["Apollo", "ApolloMini", "apollo_param_groups"]
