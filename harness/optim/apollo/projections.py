"""Random projections: generated on demand, and cached until their refresh."""

import math
from typing import Any

import torch
from torch import Tensor

from harness.optim.apollo.channels import Matrix
from harness.optim.apollo.philox import gaussian, key_of, rademacher
from harness.optim.apollo.tensor_groups import ParamGroup

PROJECTIONS = {"gaussian": gaussian, "rademacher": rademacher}

CACHE_BYTES = 64 * 2**20
"""Bytes of projections that an optimizer caches; the others are regenerated at each step."""


class Projections:
    """The matrices P of an optimizer."""

    def __init__(self) -> None:
        self._cache: dict[Any, tuple[Any, Tensor]] = {}
        self._bytes = 0

    def get(
        self,
        matrix: Matrix,
        inner: range,
        calls: int,
        settings: ParamGroup,
        device: torch.device,
    ) -> Tensor:
        """The rows of P for inner indices of a matrix, with entries from N(0, 1/r) or, for
        "rademacher", +-sqrt(1/r): fp32 (inner, r). `calls`: steps before this one."""
        rank, refresh = settings["rank"], calls // settings["update_proj_gap"]
        address = matrix.name, inner, rank
        version = refresh, settings["projection"], settings["seed"]
        if address in self._cache:
            cached_version, projection = self._cache[address]
            if cached_version == version:
                return projection
            del self._cache[address]
            self._bytes -= projection.nbytes
        generate, key = PROJECTIONS[settings["projection"]], key_of(settings["seed"], matrix.name)
        projection = generate(inner, range(rank), refresh, key, device).div_(math.sqrt(rank))
        if self._bytes + projection.nbytes <= CACHE_BYTES:
            self._cache[address] = version, projection
            self._bytes += projection.nbytes
        return projection
