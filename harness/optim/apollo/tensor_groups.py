"""The phases of APOLLO's step of low-rank matrices, with a collective between them:

    project  ->  reduce-scatter  ->  adapt  ->  all-gather  ->  apply

W is the number of ranks that share the parameters. The matrices' equations are in lowrank.py.
"""

from abc import abstractmethod

from torch import Tensor

from harness.optim.sharded import tensor_groups
from harness.optim.sharded.tensor_groups import NamedState, ParamGroup, State

__all__ = ["NamedState", "ParamGroup", "State", "TensorGroup"]


class TensorGroup(tensor_groups.TensorGroup):
    """Tensors of a parameter group that are projected together."""

    @abstractmethod
    def project(self) -> Tensor:
        """What to send to each rank, one row per rank: fp32 (W, any)."""

    @abstractmethod
    def adapt(self, received: Tensor, all_finite: Tensor) -> Tensor:
        """Updates the state if all gradients are finite. `received`: the sum of the rows that the
        ranks sent to this one. Returns what to send to all ranks: fp64 (any,)."""

    @abstractmethod
    def apply(self, gathered: Tensor, all_finite: Tensor) -> None:
        """Updates the weights if all gradients are finite. `gathered`: the results of `adapt` on
        all ranks, (W, any)."""
