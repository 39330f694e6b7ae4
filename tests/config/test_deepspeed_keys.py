"""The keys that the config knows of DeepSpeed's JSON, compared with the installed DeepSpeed."""

import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from harness.config.deepspeed_keys import KEYS, MONITOR_PACKAGES, REMOVED, Table

MODELS = {
    "zero_optimization": "runtime.zero.config:DeepSpeedZeroConfig",
    "zero_optimization.offload_param": (
        "runtime.zero.offload_config:DeepSpeedZeroOffloadParamConfig"
    ),
    "zero_optimization.offload_optimizer": (
        "runtime.zero.offload_config:DeepSpeedZeroOffloadOptimizerConfig"
    ),
    "zero_optimization.zenflow": "runtime.zenflow.zenflow_config:ZenFlowConfig",
    "zero_optimization.leaf_module": (
        "runtime.zero.leaf_module_config:DeepSpeedZeroLeafModuleConfig"
    ),
    "bf16": "runtime.precision_config:DeepSpeedBF16Config",
    "fp16": "runtime.precision_config:DeepSpeedFP16Config",
    "tensorboard": "monitor.config:TensorBoardConfig",
    "wandb": "monitor.config:WandbConfig",
    "csv_monitor": "monitor.config:CSVConfig",
    "comet": "monitor.config:CometConfig",
    "comms_logger": "comm.config:CommsLoggerConfig",
    "compile": "compile.config:CompileConfig",
    "weight_quantization": "inference.config:WeightQuantConfig",
    "hybrid_engine": "runtime.config:HybridEngineConfig",
    "tensor_parallel": "runtime.tensor_parallel.config:TPTrainingConfig",
    "tensor_parallel.tp": "runtime.tensor_parallel.config:TPConfig",
    "timers.throughput": "utils.config:DeepSpeedThroughputTimerConfig",
}
"""DeepSpeed's pydantic model of a table."""

CONSTANTS = {
    "": (
        "runtime.constants",
        # The tables of other modules, and what is read without a constant.
        "TRAIN_BATCH_SIZE OPTIMIZER SCHEDULER ZERO_ALLOW_UNTESTED_OPTIMIZER "
        "ZERO_FORCE_DS_CPU_OPTIMIZER STEPS_PER_PRINT TRAIN_MICRO_BATCH_SIZE_PER_GPU "
        "GRADIENT_ACCUMULATION_STEPS MANAGED_GRADIENT_ACCUMULATION BFLOAT16 BFLOAT16_OLD FP16 "
        "TORCH_AUTOCAST GRADIENT_CLIPPING COMMUNICATION_DATA_TYPE PRESCALE_GRADIENTS "
        "SEQ_PARALLEL_COMMUNICATION_DATA_TYPE GRADIENT_PREDIVIDE_FACTOR GRADIENT_ALLREDUCE_OP "
        "DISABLE_ALLGATHER DUMP_STATE DISABLE_PYTHON_GC VOCABULARY_SIZE WALL_CLOCK_BREAKDOWN "
        "MEMORY_BREAKDOWN CHECKPOINT DATA_TYPES DATALOADER_DROP_LAST "
        "USE_DATA_BEFORE_EXPERT_PARALLEL LOG_LEVEL",
    ),
    "torch_autocast": ("runtime.constants", "TORCH_AUTOCAST_.*"),
    "data_types": (
        "runtime.constants",
        "GRAD_ACCUM_DTYPE PARAM_DTYPE BUFFER_DTYPE KEEP_IN_FP32_.*",
    ),
    "activation_checkpointing": ("runtime.activation_checkpointing.config", "ACT_CHKPT_.*"),
    "flops_profiler": ("profiling.constants", "FLOPS_PROFILER_.*"),
    "aio": ("runtime.swap_tensor.constants", "AIO_.*"),
    "autotuning": (
        "autotuning.constants",
        "AUTOTUNING_(?!TUNER_GRID|TUNER_RANDOM|TUNER_MODEL|METRIC_[^P]).* MODEL_INFO",
    ),
    "checkpoint.writer": (
        "runtime.model_checkpointing.constants",
        "CHECKPOINT_IO_.* CHECKPOINT_WRITER_TYPE CHECKPOINT_WRITER_DECOUPLED "
        "CHECKPOINT_DATA_PARALLEL",
    ),
}
"""The module and the names of the constants that hold the keys of a table without a model."""


def module(name: str) -> Any:
    return importlib.import_module(f"deepspeed.{name}")


def table(key: str) -> Table:
    found: Any = KEYS
    for part in filter(None, key.split(".")):
        found = found[part]
    return found


@pytest.mark.parametrize("key", MODELS)
def test_the_keys_of_a_table_are_those_of_its_model(key: str) -> None:
    where, _, name = MODELS[key].partition(":")
    model: type[BaseModel] = getattr(module(where), name)
    known = table(key)
    aliases = {f.alias: n for n, f in model.model_fields.items() if f.alias}
    assert set(known) == {*model.model_fields, *aliases}
    for alias, field in {**aliases, **{n: n for n in model.model_fields}}.items():
        kinds = {model.model_fields[field].annotation}
        kinds |= set(get_args(model.model_fields[field].annotation))
        assert (known[alias] == "flag") == (bool in kinds), alias
        if known[alias] == "number":
            assert kinds & {int, float} or alias == "stage", alias


@pytest.mark.parametrize("key", CONSTANTS)
def test_the_keys_of_a_table_are_those_of_the_constants(key: str) -> None:
    where, patterns = CONSTANTS[key]
    values = set(constants(where, patterns.split()))
    assert values - set(table(key)) == set()
    if key:
        assert set(table(key)) == values


def constants(where: str, patterns: list[str]) -> Iterator[str]:
    for name, value in vars(module(where)).items():
        known = any(re.fullmatch(pattern, name) for pattern in patterns)
        if known and isinstance(value, str) and not re.search("_(DEFAULT|FORMAT|FEATURES)$", name):
            yield value


def test_the_top_level_keys_are_all_that_deepspeed_reads() -> None:
    source = inspect.getsource(module("runtime.config"))
    read = set(re.findall(r"""param_dict(?:\.get\(|\[)['"](\w+)['"]""", source))
    read |= set(re.findall(r"""['"](\w+)['"] in (?:config|param_dict)""", source))
    assert {"sequence_parallel_size", "weight_quantization", "zero_optimization"} <= read
    assert read <= set(KEYS)
    names = set(re.findall(r"get_scalar_param\(\s*param_dict,\s*([A-Z_]+)", source))
    assert len(names) > 15
    assert {getattr(module("runtime.config"), name) for name in names} <= set(KEYS)
    expert = set(table("expert_parallel"))
    fields = vars(module("module_inject.auto_ep_config").AutoEPConfig)["__dataclass_fields__"]
    assert expert == {name for name in fields if not name.startswith("_")}


def test_removed_keys_are_those_that_deepspeed_refuses() -> None:
    config = module("runtime.config")
    zero = {f"zero_optimization.{key}" for key in config._REMOVED_ZERO_CONFIG_KEYS}
    assert set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS) | zero == REMOVED


def test_the_monitors_are_those_that_import_a_package() -> None:
    source = inspect.getsource(module("monitor.utils"))
    assert set(re.findall(r"import (tensorboard|wandb|comet_ml)", source)) == set(
        MONITOR_PACKAGES.values()
    )
