"""Out of memory: what a rank reports, and smaller micro-batches for the next start.

Only the functions that a rank calls import torch.
"""

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from harness.config import Config
from harness.errors import ConfigError, OutOfMemory, is_out_of_memory

GIB = 2**30


@contextmanager
def explained(config: Config, is_building: bool = False) -> Iterator[None]:
    """Raises OutOfMemory, with what uses memory and what would need less of it. `is_building`: in
    the context there is no micro-batch yet."""
    try:
        yield
    except OutOfMemory as error:  # on all ranks, with the traceback of the one that met it
        error.add_note("\n  ".join(["what would need less:", *_advice(config, is_building)]))
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        lines = [
            f"out of memory on rank {os.environ.get('RANK', '0')}, in {_place(error)}: {reason}"
        ]
        lines += ["memory in GiB:", *_table()]
        lines += ["what would need less:", *_advice(config, is_building)]
        text = "\n  ".join(lines)
        raise OutOfMemory(text).with_traceback(error.__traceback__) from error


def _place(error: BaseException) -> str:
    """The innermost line that is not in a library."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    return f"{own[-1].filename}:{own[-1].lineno}"


def _table() -> list[str]:
    """What uses the memory of the host and of the device."""
    from harness import devices

    own, host = psutil.Process().memory_info().rss, psutil.virtual_memory()
    rows = {"host: this rank": own, "host: free": host.available, "host: all": host.total}
    rows |= {f"device: {what}": size for what, size in devices.memory_in_use().items()}
    return [f"  {name:<24}{size / GIB:8.2f}" for name, size in rows.items()]


def _advice(config: Config, is_building: bool) -> list[str]:
    """Settings that this run does not use yet, the cheapest first."""
    from harness import devices

    found = []
    if (size := config.data.micro_batch_size) > 1 and not is_building:
        found.append(
            f"  data.micro_batch_size below {size}, with more gradient_accumulation_steps; "
            'health.oom = "shrink" does both, under `harness run`'
        )
    trained = [engine for engine in config.engines.values() if engine.role == "train"]
    if (stage := min(engine.zero_stage for engine in trained)) < 3:
        found.append(f"  a ZeRO stage above {stage}, if there are several ranks")
    zero = [engine.deepspeed().get("zero_optimization", {}) for engine in trained]
    if devices.is_gpu_used() and not any("offload_optimizer" in table for table in zero):
        found.append("  zero_optimization.offload_optimizer: the optimizer's state in host memory")
    if is_building:
        return [*found, "  a smaller model"]
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
