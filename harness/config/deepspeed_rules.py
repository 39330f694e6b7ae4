"""Settings of DeepSpeed that harness does not support, one check each.

Each check takes the merged JSON, `ds`, and raises UnsupportedSetting. Those for EMA, APOLLO and
teachers apply to engines that use them.
"""

from collections.abc import Mapping
from typing import Any


class UnsupportedSetting(ValueError):
    """A key of DeepSpeed's JSON, with the value found, what is expected, and the reason."""

    def __init__(self, key: str, found: Any, expected: str, reason: str = ""):
        super().__init__(
            f"{key}: found {found!r}, expected {expected}" + (f": {reason}" if reason else "")
        )
        self.key = key


def value_at(ds: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key; None if it is absent."""
    value: Any = ds
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def half_precision(ds: Mapping[str, Any]) -> str | None:
    """The 16-bit type that is computed in, "bf16" or "fp16"; None in fp32."""
    for key, name in (("bf16", "bf16"), ("bfloat16", "bf16"), ("fp16", "fp16")):
        if value_at(ds, f"{key}.enabled") is True:
            return name
    return None


SET_BY_HARNESS = {
    "optimizer": "use engines.NAME.optimizer",
    "scheduler": "use engines.NAME.scheduler",
    "train_batch_size": "it is computed from data.micro_batch_size and gradient_accumulation_steps",
    "train_micro_batch_size_per_gpu": "use data.micro_batch_size",
}


def check_no_harness_keys(ds: Mapping[str, Any]) -> None:
    """Optimizer, schedule and batch sizes are set in the TOML config."""
    for key, instead in SET_BY_HARNESS.items():
        if key in ds:
            raise UnsupportedSetting(key, ds[key], "no such key", f"harness sets it: {instead}")


def check_precision_tables(ds: Mapping[str, Any]) -> None:
    """DeepSpeed ignores `"bf16": true`."""
    for key in ("bf16", "bfloat16", "fp16"):
        if not isinstance(ds.get(key, {}), Mapping):
            raise UnsupportedSetting(key, ds[key], "a table, like {'enabled': true}")


def check_zero_stage(ds: Mapping[str, Any]) -> None:
    """Stages 0 to 3."""
    zero = ds.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        raise UnsupportedSetting("zero_optimization", zero, "a table, like {'stage': 2}")
    if zero.get("stage", 0) not in (0, 1, 2, 3):
        raise UnsupportedSetting("zero_optimization.stage", zero["stage"], "0, 1, 2 or 3")


def check_accumulation_steps(ds: Mapping[str, Any]) -> None:
    """The number of micro-batches must be known: "auto" is not supported."""
    key = "gradient_accumulation_steps"
    count = ds.get(key, 1)
    if type(count) is not int or count < 1:
        raise UnsupportedSetting(key, count, "an integer >= 1")


def check_not_elastic(ds: Mapping[str, Any]) -> None:
    """DeepSpeed's elastic checkpoints have a layout that harness cannot read."""
    key = "zero_optimization.elastic_checkpoint"
    if elastic := value_at(ds, key):
        raise UnsupportedSetting(
            key, elastic, "false", "remove it: a run can resume on any number of ranks without it"
        )


def check_no_node_local_storage(ds: Mapping[str, Any]) -> None:
    """harness detects whether nodes have their own disks."""
    key = "checkpoint.use_node_local_storage"
    if local := value_at(ds, key):
        raise UnsupportedSetting(key, local, "false", "remove it: harness detects node-local disks")


def check_no_nvme(ds: Mapping[str, Any], reason: str) -> None:
    """Parameters and optimizer state on NVMe can be neither saved nor initialized."""
    for key in ("offload_optimizer", "offload_param"):
        if value_at(ds, f"zero_optimization.{key}.device") == "nvme":
            raise UnsupportedSetting(f"zero_optimization.{key}.device", "nvme", "'cpu'", reason)


def check_ema_precision(ds: Mapping[str, Any]) -> None:
    """EMA weights have the precision of the master weights."""
    for table in ("bf16", "bfloat16", "fp16"):
        for option in (
            "bf16_master_weights_and_grads",
            "bf16_optimizer_states",
            "fp16_master_weights_and_grads",
        ):
            key = f"{table}.{option}"
            if value := value_at(ds, key):
                reason = "ema_decay: in 16 bits EMA updates are lost to rounding"
                raise UnsupportedSetting(key, value, "false", reason)


def check_ema_covers_all(ds: Mapping[str, Any]) -> None:
    """With a ratio < 1 DeepSpeed updates the rest itself, but not their EMA."""
    _ratio_is_1(ds, "ema_decay: DeepSpeed updates the rest with its own optimizer")


def check_apollo_covers_all(ds: Mapping[str, Any]) -> None:
    """With a ratio < 1 DeepSpeed updates the rest itself, with AdamW."""
    _ratio_is_1(ds, "APOLLO: DeepSpeed updates the rest with its own AdamW")


def _ratio_is_1(ds: Mapping[str, Any], reason: str) -> None:
    key = "zero_optimization.offload_optimizer.ratio"
    ratio = value_at(ds, key)
    if ratio not in (None, 1.0):
        raise UnsupportedSetting(key, ratio, "1.0", reason)


def check_teacher_stage(ds: Mapping[str, Any]) -> None:
    """Stages 1 and 2 shard optimizer state, which a teacher does not have."""
    stage = value_at(ds, "zero_optimization.stage")
    if stage in (1, 2):
        raise UnsupportedSetting(
            "zero_optimization.stage",
            stage,
            "0, or 3 to shard the weights",
            f"ZeRO stage {stage} shards optimizer state, which a teacher does not have",
        )
