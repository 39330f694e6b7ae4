"""APOLLO beside fused AdamW and, if it is installed, the authors' own: steps of unsharded matrices.

Equal on both devices: P, and the weights after a few steps, one of them skipped."""

import importlib.util
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from bench.apollo import optimizers, the_authors_own
from bench.gpu.section import Section, run_section
from harness.optim import Apollo, ApolloMini, Muon
from harness.optim.apollo.philox import gaussian, key_of, rademacher

Shapes = list[tuple[int, int]]


def llama(width: int, hidden: int, layers: int) -> Shapes:
    """The matrices of LLaMA's blocks."""
    block = [(width, width)] * 4 + [(hidden, width)] * 2 + [(width, hidden)]
    return block * layers


SIZES = {
    "100 x 1024 x 1024": ([(1024, 1024)] * 100, 128),
    "1B": (llama(2048, 5461, 24), 256),
    "7B, 4 blocks": (llama(4096, 11008, 4), 256),
}
SMALL = {"2 x 64 x 64": ([(64, 64)] * 2, 8)}


def measure(section: Section) -> None:
    for make in (gaussian, rademacher):
        section.try_to(
            f"{make.__name__}: entries that differ", lambda make=make: differ(section, make)
        )
    section.try_to("weights differ by (relative)", lambda: weights_differ(section))
    official = the_authors_own() if importlib.util.find_spec("apollo_torch") else None
    has_kernels = section.is_on_gpu and importlib.util.find_spec("triton") is not None
    for name, (shapes, rank) in (SMALL if section.small else SIZES).items():
        times: dict[str, Any] = {}
        makers = optimizers(rank, official)
        makers["muon"] = Muon
        if hasattr(torch.optim, "Muon"):  # from torch 2.9 on
            makers["torch's muon"] = torch.optim.Muon
        if has_kernels:
            makers["apollo fused"] = partial(Apollo, rank=rank, fused=True)
        for way, make in makers.items():
            try:
                times[way] = step_of(section, shapes, make)
            except Exception as error:  # a compiler, memory: the others still follow
                times[way] = {"error": f"{type(error).__name__}: {error}"[:300]}
            if "ms" in times[way] and "ms" in times.get("adamw fused", {}):
                ratio = times[way]["ms"] / times["adamw fused"]["ms"]
                times[way]["x adamw fused"] = round(ratio, 3)
            section.add(name, times)


def differ(section: Section, make: Callable[..., torch.Tensor]) -> str:
    """Of P on the device, from that on a CPU."""
    key = [key_of(0, "a")]
    one, other = (
        make(range(3, 900), range(64), [1], key, device).cpu()
        for device in (torch.device("cpu"), section.device)
    )
    return f"{int((one != other).sum())} of {one.numel()}"


def weights_differ(section: Section) -> list[float]:
    """After 12 steps of APOLLO and of its Mini, from a CPU's."""
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((96, 64), (64, 96), (128, 128))]
    given = [[torch.randn_like(weight) for weight in start] for _ in range(12)]
    given[6][0][0, 0] = torch.nan
    found = []
    for kind in (Apollo, ApolloMini):
        ends = []
        for device in (torch.device("cpu"), section.device):
            weights = [nn.Parameter(weight.clone().to(device)) for weight in start]
            optimizer = kind(weights, lr=1e-2, update_proj_gap=5, weight_decay=0.1)
            for gradients in given:
                for weight, gradient in zip(weights, gradients, strict=True):
                    weight.grad = gradient.to(device)
                optimizer.step()
            ends.append(torch.cat([weight.detach().cpu().flatten() for weight in weights]))
        found.append(float((ends[0] - ends[1]).norm() / ends[0].norm()))
    return found


def step_of(
    section: Section, shapes: Shapes, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
) -> dict[str, Any]:
    """Of a step: its milliseconds, those of the host, those of the first one; and peak memory."""
    if section.is_on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    weights = [nn.Parameter(torch.randn(shape, device=section.device)) for shape in shapes]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer = make(weights)
    first = section.clock(optimizer.step)
    launched = section.launches(optimizer.step)
    whole, host = [], []
    for _ in range(5 if section.quick else 20):
        section.settle()
        started = time.perf_counter()
        optimizer.step()
        host.append(time.perf_counter() - started)
        section.settle()
        whole.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() if section.is_on_gpu else 0
    return {
        "ms": round(1e3 * statistics.median(whole), 3),
        "host ms": round(1e3 * statistics.median(host), 3),
        "first ms": round(1e3 * first, 1),
        "peak GB": round(peak / 1e9, 2),
        **launched,
    }


if __name__ == "__main__":
    run_section(measure)
