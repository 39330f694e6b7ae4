"""What harness refuses in DeepSpeed's JSON, one function for one rule.

Each takes the merged JSON, `ds`, and raises Refused. Those that are named after an average (ema),
APOLLO or a teacher are for an engine that has one, or is one.
"""

from collections.abc import Mapping
from typing import Any


class Refused(ValueError):
    """A key of DeepSpeed's JSON: what was found, what is expected, and why or what to do."""

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


SET_BY_HARNESS = {
    "optimizer": "use engines.NAME.optimizer",
    "scheduler": "use engines.NAME.scheduler",
    "train_batch_size": "it follows from data.micro_batch_size and gradient_accumulation_steps",
    "train_micro_batch_size_per_gpu": "use data.micro_batch_size",
}


def leaves_out_what_harness_sets(ds: Mapping[str, Any]) -> None:
    """Optimizer, schedule and batch sizes have keys of their own in the config."""
    for key, instead in SET_BY_HARNESS.items():
        if key in ds:
            raise Refused(key, ds[key], "nothing", f"it is set by harness: {instead}")


def precision_is_in_tables(ds: Mapping[str, Any]) -> None:
    """`"bf16": true` would be ignored."""
    for key in ("bf16", "bfloat16", "fp16"):
        if not isinstance(ds.get(key, {}), Mapping):
            raise Refused(key, ds[key], "a table, like {'enabled': true}")


def zero_stage_is_known(ds: Mapping[str, Any]) -> None:
    """Stages 0 to 3."""
    zero = ds.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        raise Refused("zero_optimization", zero, "a table, like {'stage': 2}")
    if zero.get("stage", 0) not in (0, 1, 2, 3):
        raise Refused("zero_optimization.stage", zero["stage"], "0, 1, 2 or 3")


def accumulation_is_a_count(ds: Mapping[str, Any]) -> None:
    """Engines accumulate a known number of micro-batches, never "auto"."""
    key = "gradient_accumulation_steps"
    count = ds.get(key, 1)
    if type(count) is not int or count < 1:
        raise Refused(key, count, "a whole number from 1")


def is_not_elastic(ds: Mapping[str, Any]) -> None:
    """DeepSpeed's elastic checkpoints have a layout that harness cannot read."""
    key = "zero_optimization.elastic_checkpoint"
    if elastic := value_at(ds, key):
        raise Refused(
            key, elastic, "false", "leave it out: a run resumes on any number of ranks without it"
        )


def leaves_node_local_storage_to_harness(ds: Mapping[str, Any]) -> None:
    """Harness detects whether each node has a disk of its own."""
    key = "checkpoint.use_node_local_storage"
    if local := value_at(ds, key):
        raise Refused(
            key, local, "false", "leave it out: whether nodes have their own disks is detected"
        )


def nothing_is_on_nvme(ds: Mapping[str, Any], reason: str) -> None:
    """Parameters and optimizer state on NVMe can neither be saved nor filled."""
    for key in ("offload_optimizer", "offload_param"):
        if value_at(ds, f"zero_optimization.{key}.device") == "nvme":
            raise Refused(f"zero_optimization.{key}.device", "nvme", "'cpu'", reason)


def ema_is_in_32_bits(ds: Mapping[str, Any]) -> None:
    """An average of the weights is kept beside the masters, in their precision."""
    for table in ("bf16", "bfloat16", "fp16"):
        for option in (
            "bf16_master_weights_and_grads",
            "bf16_optimizer_states",
            "fp16_master_weights_and_grads",
        ):
            key = f"{table}.{option}"
            if value := value_at(ds, key):
                reason = "ema_decay: in 16 bits the average's updates are lost to rounding"
                raise Refused(key, value, "false", reason)


def ema_is_of_all_parameters(ds: Mapping[str, Any]) -> None:
    """With a ratio DeepSpeed steps some parameters itself, without their average."""
    _ratio_is_1(ds, "ema_decay: DeepSpeed steps the other part with an optimizer of its own")


def apollo_steps_all_parameters(ds: Mapping[str, Any]) -> None:
    """With a ratio DeepSpeed steps some parameters itself, with AdamW."""
    _ratio_is_1(ds, "APOLLO: DeepSpeed steps the other part with an AdamW of its own")


def _ratio_is_1(ds: Mapping[str, Any], reason: str) -> None:
    key = "zero_optimization.offload_optimizer.ratio"
    ratio = value_at(ds, key)
    if ratio not in (None, 1.0):
        raise Refused(key, ratio, "1.0", reason)


def teacher_needs_no_optimizer_shards(ds: Mapping[str, Any]) -> None:
    """Stages 1 and 2 shard an optimizer's state, which a teacher does not have."""
    stage = value_at(ds, "zero_optimization.stage")
    if stage in (1, 2):
        raise Refused(
            "zero_optimization.stage",
            stage,
            "0, or 3 to shard the weights",
            f"a teacher cannot use ZeRO stage {stage}, which shards an optimizer's state",
        )
