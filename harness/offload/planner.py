"""How much to offload: everything, a fraction, or as little as the device's memory allows.

"auto" offloads everything in the first passes, and then compares the peak bytes in host memory with
the bytes that were free on the device at peak use: what fits into the latter need not be offloaded.
The measurement restarts when inputs are larger than any before.
"""

import logging
from collections.abc import Callable
from typing import Literal

from harness.errors import ConfigError

log = logging.getLogger(__name__)

WARM_UP = 3
"""Passes (forward and backward) to measure after those of the first optimizer step, which allocates
the optimizer's state."""

Fraction = Literal["auto", "all"] | float
"""How many of the blocks are offloaded; a number is from 0 to 1."""


class Planner:
    """Decides for each region whether to offload it. Offloaded regions are evenly spread, so that
    each copy out can overlap with the compute of several regions."""

    def __init__(
        self,
        fraction: Fraction,
        measure: Callable[[], tuple[int, float, float]],
        micro_batches: int = 1,
    ):
        """`measure() -> (peak bytes in host memory, headroom in bytes, stall in s)`.
        `micro_batches`: passes per optimizer step.

        Raises ConfigError if `fraction` is not "auto", "all" or a number from 0 to 1.
        """
        is_number = isinstance(fraction, int | float) and 0 <= fraction <= 1
        if fraction not in ("auto", "all") and not is_number:
            raise ConfigError(
                f'offload: fraction = {fraction!r}, expected "auto", "all", or a number from 0 to 1'
            )
        self.fraction = 1.0 if isinstance(fraction, str) else float(fraction)
        """The fraction of regions to offload now."""
        self._measure = measure if fraction == "auto" else None
        self._warm_up = WARM_UP + micro_batches - 1
        self._passes = 0  # since the measurement started
        self._last = -1  # index of the previous region
        self._unpacked = 0  # before the current pass
        self._largest = 0  # bytes of the largest region measured
        self._due = 0.0

    def wants(self, index: int, size: int, unpacked: int) -> bool:
        """Whether to offload region number `index` of the model, with inputs of `size` bytes.

        `unpacked`: tensors that backward passes have unpacked so far. A model may call a block many
        times in one forward; a new pass starts only after a backward.
        """
        if self._measure is not None:
            self._watch(index, size, unpacked)
        self._last = index
        self._due += self.fraction
        if self._due < 1:
            return False
        self._due -= 1
        return True

    def _watch(self, index: int, size: int, unpacked: int) -> None:
        if index <= self._last and unpacked > self._unpacked:
            self._passes, self._unpacked = self._passes + 1, unpacked
            if self._passes == self._warm_up:
                self._decide()
        if size > self._largest:
            self._largest, self._passes, self.fraction = size, 0, 1.0

    def _decide(self) -> None:
        assert self._measure is not None
        peak, headroom, stall = self._measure()
        self.fraction = min(max(1 - headroom / peak, 0.0), 1.0) if peak else 0.0
        log.info(
            "offload: of %.2f GB of activations, %.2f GB fit on the device: offloading %.0f %% of "
            "the regions (compute has waited %.3f s for copies)",
            peak / 1e9,
            max(0.0, min(headroom, peak)) / 1e9,
            100 * self.fraction,
            stall,
        )
