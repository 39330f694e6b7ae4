"""What a save stalls, and how fast pinned and pageable memory are."""

import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench import save
from bench.gpu.section import Section, run_section
from harness import devices, distributed
from harness.zero.startup import join

WIDTHS = {"2 GB": 11200, "20 GB": 35500}
"""Of the model, by the size of its state."""


def measure(section: Section) -> None:
    if section.is_on_gpu:
        section.try_to("copies", lambda: copies(section))
    distributed.init(600, join)
    for name, width in WIDTHS.items():
        if name == "20 GB" and (section.quick or section.small):
            continue
        width = 100 if section.small else width
        section.try_to(name, lambda width=width: saves(section, width))
    distributed.shutdown()


def copies(section: Section) -> dict[str, float]:
    """GB/s to the host, and seconds to pin 1.2 GB."""
    source = torch.empty(1_200_000_000, dtype=torch.uint8, device=section.device)
    pages, plain = (
        devices.separate_pages(source.numel()),
        torch.zeros(source.shape, dtype=torch.uint8),
    )
    pinning = section.clock(lambda: devices.pin(pages.untyped_storage()))
    found = {"seconds to pin": pinning}
    for name, target in {"pinned GB/s": pages, "pageable GB/s": plain}.items():
        times = [
            section.clock(lambda t=target: t.copy_(source, non_blocking=True)) for _ in range(3)
        ]
        found[name] = source.numel() / 1e9 / min(times)
    devices.unpin(pages.untyped_storage())
    return {name: round(value, 3) for name, value in found.items()}


def saves(section: Section, width: int) -> dict[str, Any]:
    """Median seconds of every way of bench.save, on one rank."""
    directory = Path(tempfile.mkdtemp(prefix="bench-gpu-"))
    try:
        seconds = save.measure(directory, width, 2 if section.quick or section.small else 3)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    size = seconds.pop("bytes")[0]
    times = {way: round(statistics.median(found), 3) for way, found in seconds.items()}
    return {"GB": round(size / 1e9, 2)} | times


if __name__ == "__main__":
    run_section(measure)
