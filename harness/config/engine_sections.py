"""The [engines.NAME] tables of a config file: keys, values and defaults."""

import json
import math
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    field_validator,
    model_validator,
)

from harness.config import deepspeed_rules as rules
from harness.config.paths import PathOrUrl, UserPath
from harness.config.sections import Section, check_pattern, importable, merge


class NamedConfig(BaseModel):
    """Something selected by name; all other keys are its arguments, passed on unchanged."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    @property
    def args(self) -> dict[str, Any]:
        """The arguments."""
        return dict(self.model_extra or {})


DEFAULT_SCALE_POWER = 16
"""DeepSpeed's `fp16.initial_scale_power`: a dynamic loss scale begins at 2 to this power."""

DEFAULT_GROUP = "default"
"""Name of the group of all parameters that no other group matches."""

OPTIMIZER_PACKAGES = {
    "prodigy": "prodigyopt",
    "schedulefree": "schedulefree",
    "adam8bit": "bitsandbytes",
    "adamw8bit": "bitsandbytes",
    "lion8bit": "bitsandbytes",
}
"""Optional packages of registered optimizers."""


class ParameterGroupConfig(NamedConfig):
    """[[engines.NAME.optimizer.groups]] parameters with settings of their own; other keys are the
    optimizer's arguments, for these parameters."""

    name: str = Field(pattern=r"^[A-Za-z_][\w.-]*$")
    """Name in metrics (`lr/NAME`) and commands (`lr ENGINE/NAME x0.5`)."""
    match: str
    """Regular expression that matches full names of parameters, or of modules (all their
    parameters), as `frozen` does. A parameter belongs to the first group that matches it."""
    lr: float | str | None = None
    """Learning rate, or a factor of the optimizer's, like "x0.1". Default: the optimizer's."""

    @field_validator("name")
    @classmethod
    def _is_not_default(cls, name: str) -> str:
        if name == DEFAULT_GROUP:
            raise ValueError(f"found {name!r}, the name of the parameters that no group matches")
        return name

    @field_validator("match")
    @classmethod
    def _is_pattern(cls, match: str) -> str:
        return check_pattern(match)

    @field_validator("lr")
    @classmethod
    def _is_rate(cls, lr: float | str | None) -> float | str | None:
        if lr is not None:
            _rate(lr, 1.0)
        return lr

    def rate(self, optimizer_lr: float) -> float:
        """Its learning rate, for the optimizer's own."""
        return optimizer_lr if self.lr is None else _rate(self.lr, optimizer_lr)


def _rate(lr: float | str, optimizer_lr: float) -> float:
    try:
        rate = float(lr.removeprefix("x")) * optimizer_lr if isinstance(lr, str) else lr
    except ValueError:
        rate = math.nan
    if not 0 <= rate < math.inf or (isinstance(lr, str) and not lr.startswith("x")):
        raise ValueError(f'found {lr!r}, expected a number >= 0, or a factor like "x0.1"')
    return rate


class OptimizerConfig(NamedConfig):
    """[engines.NAME.optimizer] an optimizer; other keys are its arguments."""

    name: str = "adamw"
    """A registered optimizer ("adamw", "apollo", "apollo-mini", "muon", "soap",
    "muon-deepspeed", "adafactor", "prodigy", "schedulefree", "adam8bit", "adamw8bit", "lion8bit"),
    or an import path, like "torch.optim:SGD"."""
    lr: float = Field(default=1e-3, ge=0, allow_inf_nan=False)
    """Learning rate: the peak of the schedule."""
    groups: list[ParameterGroupConfig] = Field(default=[], repr=False)
    """Parameter groups: parameters with a learning rate, weight decay, ... of their own
    (docs/training.md)."""
    no_decay: bool = Field(default=False, repr=False)
    """No weight decay for biases, norms and all other parameters of at most one dimension, in every
    group. Matrices, embeddings among them, stay decayed."""

    @field_validator("groups")
    @classmethod
    def _have_names(cls, groups: list[ParameterGroupConfig]) -> list[ParameterGroupConfig]:
        names = [group.name for group in groups]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two groups are named {name!r}")
        return groups

    @field_validator("name")
    @classmethod
    def _installed(cls, name: str) -> str:
        package = OPTIMIZER_PACKAGES.get(name)
        if package and not importable(package):
            raise ValueError(f"{name!r} is not installed: pip install {package}")
        return name


class SchedulerConfig(NamedConfig):
    """[engines.NAME.scheduler] a learning-rate schedule; other keys are its arguments."""

    name: str
    """A registered schedule ("constant", "linear", "cosine", "cosine-with-restarts", "one-cycle",
    "noam", "inverse-sqrt", "warmup-stable-decay", "plateau"), or the import path of a function
    `(total_steps, **arguments) -> (step -> factor)`. `warmup` is a number of steps, or below 1 a
    ratio of all steps (docs/training.md)."""


class LoraConfig(Section):
    """[engines.NAME.lora] low-rank adapters, trained instead of the weights (needs peft)."""

    targets: str
    """Regular expression that matches full layer names, like ".*\\.(query|value)"."""
    rank: int = Field(default=8, ge=1)
    """Rank of the weight updates."""
    alpha: float = Field(default=16, gt=0, allow_inf_nan=False)
    """Updates are scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapters' input."""

    @field_validator("targets")
    @classmethod
    def _is_pattern(cls, targets: str) -> str:
        if targets.lower() == "all-linear":
            raise ValueError(
                f"found {targets!r}, a peft keyword: expected a regular expression that matches "
                "layer names"
            )
        return check_pattern(targets)

    @model_validator(mode="after")
    def _installed(self) -> "LoraConfig":
        if not importable("peft"):
            raise ValueError("peft is not installed: pip install peft")
        return self


class EngineConfig(Section):
    """[engines.NAME] one model under DeepSpeed."""

    ds_config: UserPath | None = None
    """DeepSpeed's own JSON: ZeRO, precision, gradient accumulation, gradient clipping. Required,
    unless all of it is in `ds_overrides`."""
    ds_overrides: dict[str, Any] = Field(default={})
    """DeepSpeed keys that replace those of `ds_config`, table by table."""
    role: Literal["train", "teacher"] = "train"
    """"train", or "teacher": frozen, in eval mode, never stepped."""
    optimizer: OptimizerConfig | None = None
    """Optimizer; required for role "train"."""
    scheduler: SchedulerConfig | None = None
    """Learning-rate schedule; constant by default."""
    frozen: list[str] = Field(default=[])
    """Parameters that are not trained: regular expressions that match full names of parameters, or
    of modules (all their parameters), like "blocks\\.[0-3]"."""
    lora: LoraConfig | None = None
    """Train low-rank adapters only."""
    init_from: PathOrUrl | None = None
    """Initial weights, instead of the task's: a .sft or .pt, a Hugging Face folder, an export or a
    checkpoint, also by a URL like "s3://bucket/runs/NAME". Ignored when a run resumes, except for a
    teacher."""
    train_every: int = Field(default=1, ge=1)
    """Train only at every N-th step of the run."""
    unused_parameters: Literal["error", "zeros"] = "error"
    """Parameters that the losses of only some ranks use, as with experts: "error" ends the run
    (above ZeRO 0), "zeros" lets the other ranks count with gradients of zero. With "zeros", ZeRO 3
    gathers the whole model for each micro-batch."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay of an exponential moving average (EMA) of the weights, like 0.999: evaluations use the
    EMA weights, and exports also write them, as NAME.ema. Default: no EMA."""
    buffers: Literal["sync", "own"] | None = None
    """Whose buffers are used, where training changes them (running statistics, codebooks): "sync":
    before every step, every rank takes rank 0's, as with torch's DDP; "own": every rank keeps its
    own, also in checkpoints; evaluations use each rank's own, and exports have rank 0's. Default:
    "sync", and in a resumed run that of its checkpoint."""
    buffer_dtype: Literal["keep", "model"] = "keep"
    """In bf16 or fp16: "keep" leaves the model's buffers in the dtype that they were built with, as
    DeepSpeed does (tables of rotary angles must stay in float32); "model" casts floating ones to
    the dtype of the weights, as `model.bfloat16()` does, except those that DeepSpeed's
    `data_types.keep_in_fp32_modules` names."""
    max_loss_scale: float | None = Field(default=None, ge=1, allow_inf_nan=False)
    """In fp16: the largest loss scale. DeepSpeed doubles a dynamic one after `loss_scale_window`
    steps without an overflow, so that near the limit of fp16 one step in so many is skipped.
    Default: no limit."""
    _file: tuple[Path | None, dict[str, Any]] | None = PrivateAttr(default=None)
    """Path and content of `ds_config`."""

    @field_validator("frozen")
    @classmethod
    def _are_patterns(cls, frozen: list[str]) -> list[str]:
        return [check_pattern(text) for text in frozen]

    @model_validator(mode="after")
    def _fits_role(self) -> "EngineConfig":
        if self.role == "train":
            if self.optimizer is None:
                raise ValueError("role = 'train' needs an optimizer, like {name = 'adamw'}")
            return self
        if self.optimizer or self.scheduler:
            raise ValueError("a teacher is not trained: remove optimizer and scheduler")
        if self.train_every > 1 or self.ema_decay or self.frozen or self.lora or self.buffers:
            raise ValueError(
                "a teacher is not trained: remove train_every, ema_decay, frozen, lora and buffers"
            )
        return self

    @model_validator(mode="after")
    def _read_deepspeed(self) -> "EngineConfig":
        if self.ds_config is None and not self.ds_overrides:
            raise ValueError("ds_config is missing: the path of DeepSpeed's JSON, or ds_overrides")
        self._file = self.ds_config, _json_object(self.ds_config)
        try:
            self._check_deepspeed(self.deepspeed())
        except rules.UnsupportedSetting as error:
            is_override = rules.value_at(self.ds_overrides, error.key) is not None
            is_override |= self.ds_config is None
            origin = "ds_overrides" if is_override else f"ds_config {self.ds_config}"
            raise ValueError(f"{origin}: {error}") from None
        return self

    def _check_deepspeed(self, ds: Mapping[str, Any]) -> None:
        rules.check_no_harness_keys(ds)
        rules.check_precision_tables(ds)
        rules.check_zero_stage(ds)
        rules.check_accumulation_steps(ds)
        rules.check_keys(ds)
        rules.check_gradient_clipping(ds)
        rules.check_monitors(ds)
        rules.check_not_elastic(ds)
        rules.check_no_node_local_storage(ds)
        if self.role == "train":
            rules.check_norm_is_computed(ds)
            rules.check_no_nvme(ds, "checkpoints would lack the state on NVMe")
        else:
            rules.check_teacher_stage(ds)
        if self.max_loss_scale:
            rules.check_dynamic_loss_scale(ds)
        if self.init_from is not None:
            rules.check_no_nvme(ds, "init_from cannot initialize state on NVMe")
        if self.ema_decay:
            rules.check_ema_precision(ds)
            rules.check_ema_covers_all(ds)

    @property
    def gradient_accumulation(self) -> int:
        """Micro-batches per optimizer step."""
        return self.deepspeed().get("gradient_accumulation_steps", 1)

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage, 0 to 3."""
        return self.deepspeed().get("zero_optimization", {}).get("stage", 0)

    def deepspeed(self) -> dict[str, Any]:
        """A copy of `ds_config`, as read at validation, with `ds_overrides` merged in.

        Raises ValueError if `ds_config` was replaced since, and the new file cannot be read.
        """
        path, table = self._file or (None, {})
        if path != self.ds_config:  # after model_copy(update=...), which validates nothing
            table = _json_object(self.ds_config)
        ds = deepcopy(merge(table, self.ds_overrides))
        if self.buffer_dtype == "model" and (dtype := rules.half_precision(ds)):
            ds = merge(ds, {"data_types": {"buffer_dtype": dtype}})
        if self.max_loss_scale:
            power = rules.value_at(ds, "fp16.initial_scale_power")
            power = DEFAULT_SCALE_POWER if power is None else power
            power = min(power, int(math.log2(self.max_loss_scale)))
            ds = merge(ds, {"fp16": {"initial_scale_power": power}})
        return ds


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"repeated keys: {sorted(repeated)}")
    return dict(pairs)


def _json_object(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        text = path.read_text(encoding="utf-8-sig")
        table = json.loads(text, object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise ValueError(f"ds_config {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"ds_config {path} is not JSON: {error}") from None
    if not isinstance(table, dict):
        raise ValueError(f"ds_config {path}: expected a JSON object")
    return table
