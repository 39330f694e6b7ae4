"""Builds DeepSpeed engines; what DeepSpeed refuses in its JSON is a ConfigError."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn
from torch.optim import Optimizer

from harness.distributed.forks import sockets_close_in_forks
from harness.errors import ConfigError
from harness.zero.parameters import is_sharded, make_contiguous
from harness.zero.sharded_init import cast_parameters

SLOW_IMPORTS = ["deepspeed.runtime.zero.muon.muon_optimizer"]
"""What the first engine of a process imports, and with it torch's compiler: seconds."""

TABLES = {
    "DeepSpeedZeroConfig": "zero_optimization",
    "DeepSpeedBF16Config": "bf16",
    "DeepSpeedFP16Config": "fp16",
    "DeepSpeedMonitorConfig": "",
    "CommsLoggerConfig": "comms_logger",
    "CompileConfig": "compile",
    "WeightQuantConfig": "weight_quantization",
    "TPTrainingConfig": "tensor_parallel",
    "HybridEngineConfig": "hybrid_engine",
    "DeepSpeedThroughputTimerConfig": "timers.throughput",
}
"""The table of the JSON that each class of DeepSpeed's is filled from."""


def initialize(
    model: nn.Module, optimizer: Optimizer | None, scheduler: Any, settings: dict[str, Any]
) -> Any:
    """A DeepSpeed engine around `model`. Collective.

    `settings`: DeepSpeed's JSON. Raises ConfigError if DeepSpeed does not support them.
    """
    import deepspeed  # late: zero.startup patches it first

    make_contiguous(model.parameters())
    if any(map(is_sharded, model.parameters())):
        cast_parameters(model, _compute_dtype(settings))  # LoRA's are new; DeepSpeed casts none
    with _refusals(), sockets_close_in_forks():  # of its process groups
        engine = deepspeed.initialize(
            model=model, optimizer=optimizer, lr_scheduler=scheduler, config=settings
        )[0]
    optimizer_of_engine: Any = engine.optimizer
    if hasattr(optimizer_of_engine, "check_grad_overflow"):  # false in bf16 would apply NaN
        optimizer_of_engine.check_grad_overflow |= engine.bfloat16_enabled()
    return engine


def _compute_dtype(settings: dict[str, Any]) -> torch.dtype:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = DeepSpeedConfig(settings)
    if config.bfloat16_config.enabled:
        return torch.bfloat16
    return torch.float16 if config.float16_config.enabled else torch.float32


def check_settings(settings: dict[str, Any]) -> None:
    """Raises ConfigError if DeepSpeed cannot read its JSON, or this device not what it asks for."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.config import DeepSpeedConfig

    with _refusals(Exception):  # it does nothing but read
        config = DeepSpeedConfig(settings)
    accelerator: Any = get_accelerator()
    for table, is_enabled, is_supported in (
        ("fp16", config.float16_config.enabled, accelerator.is_fp16_supported()),
        ("bf16", config.bfloat16_config.enabled, accelerator.is_bf16_supported()),
    ):
        if is_enabled and not is_supported:
            device = accelerator.device_name()
            raise ConfigError(f"{table}.enabled: this {device} does not compute in {table}")


@contextmanager
def _refusals(*kinds: type[Exception]) -> Iterator[None]:
    """Makes DeepSpeed's own errors ConfigErrors."""
    from deepspeed.runtime.config import DeepSpeedConfigError

    refusals = (ValueError, AssertionError, NotImplementedError, ImportError, DeepSpeedConfigError)
    refusals = kinds or refusals
    try:
        yield
    except ValidationError as error:
        table = TABLES.get(error.title, error.title)
        raise ConfigError("; ".join(_explain(dict(e), table) for e in error.errors())) from None
    except refusals as error:
        raise ConfigError(f"DeepSpeed: {error or type(error).__name__}") from error


def _explain(mistake: dict[str, Any], table: str) -> str:
    """The key, what was found, and what DeepSpeed expects."""
    key = ".".join(filter(None, [table, *map(str, mistake["loc"])]))
    found = f"found {mistake['input']!r}: " if mistake["loc"] else ""  # else the whole table
    return f"{key}: {found}{mistake['msg']}"
