"""Every optimizer of harness that ZeRO shards, for the model of `given_gradients`."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from harness.optim.apollo import memory as apollo_memory
from harness.optim.matrices import memory as matrix_memory
from tests.support.given_gradients import Given, apollo, plain
from tests.support.matrix_optimizers import muon, soap


class Kind(NamedTuple):
    make: Callable[..., Any]
    is_mini: bool
    settings: dict[str, Any]
    state_bytes: Callable[..., list[int]]
    bound: float
    """On |difference| / max|W| to the unsharded optimizer, after 40 steps."""

    def of(self, model: nn.Module, **settings: Any) -> Any:
        return self.make(model, self.is_mini, **self.settings, **settings)

    def unsharded(self, steps: int) -> tuple[Given, Any]:
        return plain(self.make, self.is_mini, steps, tuple(self.settings.items()))


KINDS = {
    "apollo": Kind(apollo, False, {}, apollo_memory.state_bytes, 5e-7),
    "apollo-mini": Kind(apollo, True, {}, apollo_memory.state_bytes, 5e-7),
    "apollo, svd": Kind(apollo, False, {"projection": "svd"}, apollo_memory.state_bytes, 5e-7),
    "muon": Kind(muon, False, {}, matrix_memory.state_bytes, 2e-6),
    "soap": Kind(soap, False, {}, matrix_memory.state_bytes, 2e-6),
}
