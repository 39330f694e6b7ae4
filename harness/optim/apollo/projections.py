"""Random projections: generated on demand, and cached until their refresh."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from harness.devices import limits
from harness.optim.apollo.channels import Matrix
from harness.optim.apollo.philox import gaussian, key_of, rademacher
from harness.optim.apollo.tensor_groups import ParamGroup

PROJECTIONS = {"gaussian": gaussian, "rademacher": rademacher}


class Projections:
    """The matrices P of an optimizer."""

    def __init__(self, gaussian: Any) -> None:
        """`gaussian`: as philox's."""
        self._generators = PROJECTIONS | {"gaussian": gaussian}
        self._cache: dict[Any, tuple[Any, Tensor]] = {}
        self._bytes = 0

    def get(
        self,
        matrices: Sequence[Matrix],
        inner: range,
        calls: Sequence[int],
        settings: ParamGroup,
        device: torch.device,
    ) -> list[Tensor]:
        """The rows of the P of each matrix for the same inner indices, with entries from N(0, 1/r)
        or, for "rademacher", +-sqrt(1/r): fp32 (inner, r) each. `calls`: steps before this one."""
        refreshes = [count // settings["update_proj_gap"] for count in calls]
        addresses = [(matrix.name, inner, settings["rank"]) for matrix in matrices]
        versions = [(refresh, settings["projection"], settings["seed"]) for refresh in refreshes]
        due = [
            number
            for number, (address, version) in enumerate(zip(addresses, versions, strict=True))
            if self._cache.get(address, (None,))[0] != version
        ]
        made: dict[int, Tensor] = {}
        if due:
            for old in (self._cache.pop(addresses[number], None) for number in due):
                self._bytes -= old[1].nbytes if old else 0
            keys = [key_of(settings["seed"], matrices[number].name) for number in due]
            generate, rank = self._generators[settings["projection"]], settings["rank"]
            due_refreshes = [refreshes[number] for number in due]
            batch = generate(inner, range(rank), due_refreshes, keys, device).div_(math.sqrt(rank))
            made = dict(zip(due, batch, strict=True))
            if self._bytes + batch.nbytes <= limits(device).cache_bytes:
                self._cache |= {
                    addresses[number]: (versions[number], made[number]) for number in due
                }
                self._bytes += batch.nbytes
        return [
            made[number] if number in made else self._cache[address][1]
            for number, address in enumerate(addresses)
        ]
