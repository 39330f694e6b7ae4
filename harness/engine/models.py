"""What DeepSpeed is given: the settings of every engine."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from harness import distributed
from harness.config.engine_sections import EngineConfig
from harness.errors import ConfigError
from harness.zero.initialize import check_settings


def engine_settings(config: EngineConfig, micro_batch_size: int) -> dict[str, Any]:
    """DeepSpeed's JSON for an engine, with what harness sets itself."""
    settings = {
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": micro_batch_size,
    }
    return settings | config.deepspeed()


def check_engines(configs: Mapping[str, EngineConfig], micro_batch_size: int) -> None:
    """Raises ConfigError, on all ranks, if DeepSpeed refuses the JSON of an engine. Collective."""
    with distributed.raise_on_all_ranks("engines"):
        for name, config in configs.items():
            with settings_named(name, config):
                check_settings(engine_settings(config, micro_batch_size))


@contextmanager
def settings_named(name: str, config: EngineConfig) -> Iterator[None]:
    """Names the engine and its file in a ConfigError."""
    try:
        yield
    except ConfigError as error:
        where = f"ds_config {config.ds_config}{' with ds_overrides' * bool(config.ds_overrides)}"
        raise ConfigError(f"engines.{name}: {where}: {error}") from error
