"""Settings of DeepSpeed that harness does not support, one check each.

Each check takes the merged JSON, `ds`, and raises UnsupportedSetting. Those for EMA, APOLLO,
Muon and teachers apply to engines that use them.
"""

from collections.abc import Mapping
from typing import Any

from harness.config.deepspeed_keys import KEYS, MONITOR_PACKAGES, REMOVED, Table
from harness.config.sections import importable
from harness.errors import did_you_mean


class UnsupportedSetting(ValueError):
    """A key of DeepSpeed's JSON, with the value found, what is expected, and the reason."""

    def __init__(self, key: str, found: Any, expected: str, reason: str = ""):
        super().__init__(
            f"{key}: found {found!r}, expected {expected}" + (f": {reason}" if reason else "")
        )
        self.key = key


class UnknownKey(UnsupportedSetting):
    """A key that DeepSpeed does not know, and would ignore."""

    def __init__(self, key: str, known: Table):
        hint = did_you_mean(key.rpartition(".")[2], known)
        removed = "DeepSpeed has removed it" if key in REMOVED else f"unknown key{hint}"
        ValueError.__init__(self, f"{key}: {removed}")
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


def check_keys(ds: Mapping[str, Any]) -> None:
    """DeepSpeed ignores some typos, and "auto" in most tables: the default is used."""
    _check_table(ds, KEYS, "")


def _check_table(table: Mapping[str, Any], known: Table, prefix: str) -> None:
    for name, value in table.items():
        key = f"{prefix}{name}"
        if name not in known:
            raise UnknownKey(key, known)
        kind = known[name]
        if isinstance(kind, dict) and isinstance(value, Mapping):
            _check_table(value, kind, f"{key}.")
        elif kind == "flag" and isinstance(value, str):
            raise UnsupportedSetting(key, value, "true or false", _AUTO if value == "auto" else "")
        elif kind == "number" and isinstance(value, str):
            raise UnsupportedSetting(key, value, "a number", _AUTO if value == "auto" else "")
        elif kind != "auto" and value == "auto":
            raise UnsupportedSetting(key, value, "a value, or no such key", _AUTO)
        elif isinstance(kind, dict) and value is not None:
            raise UnsupportedSetting(key, value, "a table")


_AUTO = "only the Hugging Face Trainer replaces 'auto', and DeepSpeed ignores it"


def check_gradient_clipping(ds: Mapping[str, Any]) -> None:
    """DeepSpeed does not check it."""
    key = "gradient_clipping"
    norm = ds.get(key, 1.0)
    if isinstance(norm, bool) or not isinstance(norm, int | float) or not norm >= 0:
        raise UnsupportedSetting(key, norm, "a number >= 0 (0: no clipping)")


def check_monitors(ds: Mapping[str, Any]) -> None:
    """DeepSpeed imports their packages on rank 0, once the other ranks have gone on."""
    for table, package in MONITOR_PACKAGES.items():
        key = f"{table}.enabled"
        if value_at(ds, key) and not importable(package):
            reason = f"{package} is not installed: pip install {package}"
            raise UnsupportedSetting(key, True, "false", reason)


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


def check_norm_is_computed(ds: Mapping[str, Any]) -> None:
    """Without it DeepSpeed applies gradients that are not finite."""
    key = "zero_optimization.compute_grad_norm"
    if value_at(ds, key) is False and value_at(ds, "zero_optimization.stage") in (1, 2):
        reason = "whether a step is taken is decided by the norm of its gradient"
        raise UnsupportedSetting(key, False, "true", reason)


def check_no_nvme(ds: Mapping[str, Any], reason: str) -> None:
    """Parameters and optimizer state on NVMe can be neither saved nor initialized."""
    for key in ("offload_optimizer", "offload_param"):
        if value_at(ds, f"zero_optimization.{key}.device") == "nvme":
            raise UnsupportedSetting(f"zero_optimization.{key}.device", "nvme", "'cpu'", reason)


def check_dynamic_loss_scale(ds: Mapping[str, Any]) -> None:
    """Only fp16 has a loss scale, and only a dynamic one grows."""
    if not (found := value_at(ds, "fp16.enabled")):
        reason = "max_loss_scale: only fp16 has a loss scale"
        raise UnsupportedSetting("fp16.enabled", found, "true", reason)
    if scale := value_at(ds, "fp16.loss_scale"):
        reason = "max_loss_scale: one that is set does not grow"
        raise UnsupportedSetting("fp16.loss_scale", scale, "0", reason)


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


def check_optimizer_covers_all(ds: Mapping[str, Any]) -> None:
    """With a ratio < 1 DeepSpeed updates the rest itself, with AdamW."""
    _ratio_is_1(ds, "DeepSpeed updates the rest with its own AdamW")


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
