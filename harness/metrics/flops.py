"""Model FLOPs utilization (MFU): what share of the devices' peak the model's own arithmetic is.

After Chowdhery et al., PaLM, 2022 (arXiv:2204.02311, appendix B): what is computed again in
backward does not count.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch.utils.flop_counter import FlopCounterMode

from harness import distributed
from harness.health import phases
from harness.health.phases import Phase
from harness.metrics.meters import StepNumbers

PEAKS = {
    "GB200": 2500,  # NVIDIA GB200 NVL72 datasheet, per GPU
    "B200": 2250,  # NVIDIA HGX B200 datasheet, per GPU
    "H200 NVL": 835.5,  # NVIDIA H200 datasheet
    "H200": 989.5,
    "GH200": 989.5,  # NVIDIA GH200 datasheet
    "H100 PCIe": 756.5,  # NVIDIA H100 datasheet
    "H100 NVL": 835.5,
    "H100 80GB HBM3": 989.5,
    "A100": 312,  # NVIDIA A100 datasheet
    "A40": 149.7,  # NVIDIA A40 datasheet
    "A30": 165,  # NVIDIA A30 datasheet
    "A10": 125,  # NVIDIA A10 datasheet
    "L40S": 362,  # NVIDIA L40S datasheet
    "L4": 121,  # NVIDIA L4 datasheet
    "V100-SXM2": 125,  # NVIDIA V100 datasheet
    "V100-PCIE": 112,
    "T4": 65,  # NVIDIA T4 datasheet
    "MI300X": 1307.4,  # AMD Instinct MI300X data sheet
    "MI250X": 191.5,  # AMD Instinct MI250X data sheet: 383 for both of its devices
}
"""TFLOP/s of dense 16-bit matrix products, by a part of the device's name. Datasheets often give
twice as much, "with sparsity"."""


class _Engine(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> torch.dtype: ...


def peak(device: str) -> float | None:
    """FLOP/s of a device by its name, as torch gives it; None if unknown."""
    words = f" {device} ".replace("-", " ")
    for name, tflops in PEAKS.items():
        if f" {name} ".replace("-", " ") in words:
            return tflops * 1e12
    return None


class FlopMeter:
    """Counts the FLOPs of the first micro-batch of each set of engines that a step trains, on this
    rank; those of other steps are as many for each token, or sample if there are no tokens."""

    def __init__(self, is_compiled: bool):
        """`is_compiled`: by torch.compile, whose kernels cannot be counted."""
        device = distributed.device()
        is_known = device.type == "cuda" and not is_compiled
        self._peak = peak(torch.cuda.get_device_name(device)) if is_known else None
        self._per_unit: dict[tuple[str, ...], float] = {}

    @contextmanager
    def counting(self, due: Sequence[_Engine], samples: int, tokens: int) -> Iterator[None]:
        """Counts within the context, if it has to. `due`: the engines that are trained in it."""
        names, units = tuple(engine.name for engine in due), tokens or samples
        if self._peak is None or names in self._per_unit or not (units and _are_16_bit(due)):
            yield
            return
        with _by_phase() as flops:
            yield
        forward, backward = flops["forward"], flops["backward"]
        self._per_unit[names] = (forward + min(backward, 2 * forward)) / units

    def utilization(
        self, due: Sequence[_Engine], step: StepNumbers, seconds: float
    ) -> dict[str, float]:
        """`mfu` of a step, from 0 to 1; empty if it is not known."""
        per_unit = self._per_unit.get(tuple(engine.name for engine in due))
        if self._peak is None or not per_unit:
            return {}
        available = seconds * self._peak * distributed.world_size()
        return {"mfu": per_unit * (step.tokens or step.samples) / available}


def _are_16_bit(engines: Sequence[_Engine]) -> bool:
    return all(engine.dtype in (torch.bfloat16, torch.float16) for engine in engines)


@contextmanager
def _by_phase() -> Iterator[Counter[Phase]]:
    """Counts FLOPs within the context, by the phase that this rank is in."""
    flops: Counter[Phase] = Counter()
    phase: Phase = "step"
    listener = phases.listener
    with FlopCounterMode(display=False) as mode:

        def enter(following: Phase) -> None:
            nonlocal phase
            flops[phase] += mode.get_total_flops() - flops.total()
            phase = following
            if listener is not None:
                listener(following)

        phases.listener = enter
        try:
            yield flops
        finally:
            phases.listener = listener
