"""What DeepSpeed is given: the settings of every engine, and models built by functions."""

import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from harness import distributed
from harness.config import Config
from harness.config.engine_sections import EngineConfig
from harness.distributed.network import is_lost_rank
from harness.errors import ConfigError, HarnessError, TaskError
from harness.zero.initialize import check_settings
from harness.zero.parameters import is_of_earlier_run
from harness.zero.sharded_init import build_in_shards


def engine_settings(config: EngineConfig, micro_batch_size: int) -> dict[str, Any]:
    """DeepSpeed's JSON for an engine, with what harness sets itself."""
    settings = {
        "steps_per_print": 2**31,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice per step
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
        file = f"ds_config {config.ds_config}" if config.ds_config else ""
        where = " with ".join(filter(None, [file, "ds_overrides" * bool(config.ds_overrides)]))
        raise ConfigError(f"engines.{name}: {where}: {error}") from error


def build_models(
    models: Mapping[str, nn.Module | Callable[[], nn.Module]], config: Config
) -> dict[str, nn.Module]:
    """The models, those that are functions called in turn, at ZeRO stage 3 in shards. Collective.

    The weights are those of the same model that the task builds first of all. Raises TaskError if a
    function fails, on every rank where it does, or returns no module.
    """
    if any(not isinstance(model, nn.Module) for model in models.values()):
        distributed.seed_everything(config.run.seed)
    return {name: _built(name, model, config) for name, model in models.items()}


def _built(name: str, model: Any, config: Config) -> nn.Module:
    if isinstance(model, nn.Module):
        if any(map(is_of_earlier_run, model.parameters())):
            raise TaskError(
                f"model {name!r}: an earlier run at ZeRO stage 3 has left it in shards: build it "
                "again, or give the Task a function that builds it"
            )
        return model
    settings = engine_settings(config.engines[name], config.data.micro_batch_size)
    is_sharded = config.engines[name].zero_stage == 3
    try:
        built = build_in_shards(model, settings) if is_sharded else model()
    except HarnessError:
        raise
    except Exception as error:
        if is_lost_rank(error):  # in a collective of ZeRO 3
            raise
        raise TaskError(
            f"model {name!r}: its function failed:\n{traceback.format_exc()}"
        ) from error
    if not isinstance(built, nn.Module):
        raise TaskError(
            f"model {name!r}: its function returned {type(built).__name__}, expected an nn.Module"
        )
    return built
