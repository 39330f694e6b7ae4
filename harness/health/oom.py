"""Out of memory: what a rank reports, and smaller micro-batches for the next start.

Only the functions that a rank calls import torch.
"""

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from harness.config import Config
from harness.errors import ConfigError, OutOfMemory

GIB = 2**30
_CLASSES = {"OutOfMemoryError", "MemoryError"}
_TEXTS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""In a RuntimeError: torch raises its own class for its allocator of the device alone."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the device, or of the host, has run out."""
    if _CLASSES & {kind.__name__ for kind in type(error).__mro__}:
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS)


@contextmanager
def explained(config: Config) -> Iterator[None]:
    """Raises OutOfMemory, with what uses memory and what would need less of it."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        lines = [
            f"out of memory on rank {os.environ.get('RANK', '0')}, in {_place(error)}: {reason}"
        ]
        lines += ["memory in GiB:", *_table(), "what would need less:", *_advice(config)]
        text = "\n  ".join(lines)
        raise OutOfMemory(text).with_traceback(error.__traceback__) from error


def _place(error: BaseException) -> str:
    """The innermost line that is not in a library."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    return f"{own[-1].filename}:{own[-1].lineno}"


def _table() -> list[str]:
    """What uses the memory of the device and of the host."""
    import torch

    own, host = psutil.Process().memory_info().rss, psutil.virtual_memory()
    rows = {"host: this rank": own, "host: free": host.available, "host: all": host.total}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        free, total = torch.cuda.mem_get_info()
        stats = torch.cuda.memory_stats()
        reserved = stats["reserved_bytes.all.current"]
        rows |= {
            "device: tensors": stats["allocated_bytes.all.current"],
            "device: tensors, most": stats["allocated_bytes.all.peak"],
            "device: torch's cache": reserved - stats["allocated_bytes.all.current"],
            "device: others": total - free - reserved,
            "device: free": free,
            "device: all": total,
        }
    return [f"  {name:<24}{size / GIB:8.2f}" for name, size in rows.items()]


def _advice(config: Config) -> list[str]:
    """Settings that this run does not use yet, the cheapest first."""
    found = []
    if (size := config.data.micro_batch_size) > 1:
        found.append(
            f"  data.micro_batch_size below {size}, with more gradient_accumulation_steps; "
            'health.oom = "shrink" does both, under `harness run`'
        )
    stages = {engine.zero_stage for engine in config.engines.values() if engine.role == "train"}
    if min(stages) < 3:
        found.append(f"  a ZeRO stage above {min(stages)}, if there are several ranks")
    if not config.optimizations.unsloth:
        found.append("  optimizations.unsloth = true: activations in host memory")
    return [*found, "  data.max_tokens, shorter samples, or a smaller model"]


def check_can_shrink(config: Config, has_own_loader: bool) -> None:
    """Raises ConfigError if smaller micro-batches would train otherwise, or cannot be made."""
    if config.health.oom == "shrink" and (has_own_loader or config.data.sampler == "batched"):
        what = "the task's own loader" if has_own_loader else "data.sampler = 'batched'"
        raise ConfigError(
            f"health.oom = 'shrink': {what} makes the micro-batches, and smaller ones would be of "
            "other samples: use 'stop'"
        )


def shrunk(config: Config) -> tuple[list[str], str]:
    """Words for the end of the command line that make the micro-batches smaller, by the smallest
    factor that divides them, and a step of as many more of them; and a description.

    Raises ConfigError if they cannot be smaller.
    """
    size = config.data.micro_batch_size
    if size == 1:
        raise ConfigError("data.micro_batch_size is 1: it cannot be smaller")
    factor = next(n for n in range(2, size + 1) if size % n == 0)
    words = [f"--data.micro_batch_size={size // factor}"]
    counts = []
    for name, engine in config.engines.items():
        if engine.role == "train":
            count = engine.gradient_accumulation * factor
            words.append(f"--engines.{name}.ds_overrides.gradient_accumulation_steps={count}")
            counts.append(f"{name}: {engine.gradient_accumulation} -> {count}")
    return words, (
        f"data.micro_batch_size {size} -> {size // factor}, gradient_accumulation_steps of "
        + ", ".join(counts)
    )
