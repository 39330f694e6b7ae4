"""The tables of the engines in a config file, and what each of their keys may be.

Nothing here imports torch, so that a mistake in the config is reported within a second.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from harness.config.sections import Section, importable, merge, pattern


class NamedConfig(BaseModel):
    """A thing chosen by name, with arguments of its own that are passed on as they are."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    @property
    def args(self) -> dict[str, Any]:
        """The keys beside the declared ones."""
        return dict(self.model_extra or {})


OPTIMIZER_PACKAGES = {
    "prodigy": "prodigyopt",
    "schedulefree": "schedulefree",
    "adam8bit": "bitsandbytes",
    "adamw8bit": "bitsandbytes",
    "lion8bit": "bitsandbytes",
}
"""The packages of the registered optimizers that do not come with harness."""


class OptimizerConfig(NamedConfig):
    """[engines.NAME.optimizer] an optimizer; further keys are its own arguments."""

    name: str = "adamw"
    """A registered optimizer ("adamw", "apollo", "apollo-mini", "muon", "adafactor", "prodigy",
    "schedulefree", "adam8bit", "adamw8bit", "lion8bit"), or an import path, like
    "torch.optim:SGD"."""
    lr: float = Field(default=1e-3, ge=0, allow_inf_nan=False)
    """Learning rate: the schedule's peak."""

    @field_validator("name")
    @classmethod
    def _installed(cls, name: str) -> str:
        package = OPTIMIZER_PACKAGES.get(name)
        if package and not importable(package):
            raise ValueError(f"{name!r} is not installed: pip install {package}")
        return name


class SchedulerConfig(NamedConfig):
    """[engines.NAME.scheduler] a learning-rate schedule; further keys are its own arguments."""

    name: str
    """A registered schedule: "constant", "linear", "cosine", "one-cycle", "noam" or
    "warmup-stable-decay"."""


class LoraConfig(Section):
    """[engines.NAME.lora] low-rank adapters, trained in the place of the weights (extra: lora)."""

    targets: str
    """Regular expression for the whole names of the layers, like ".*\\.(query|value)"."""
    rank: int = Field(default=8, ge=1)
    """Rank of what is added to a weight."""
    alpha: float = Field(default=16, gt=0, allow_inf_nan=False)
    """What is added is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of an adapter's input."""

    @model_validator(mode="after")
    def _possible(self) -> "LoraConfig":
        pattern(self.targets)
        if self.targets.lower() == "all-linear":
            raise ValueError(
                f"targets = {self.targets!r} is a word of peft's: give a regular expression for "
                "the names of the layers"
            )
        if not importable("peft"):
            raise ValueError("not installed: pip install 'harness[lora]'")
        return self


class EngineConfig(Section):
    """[engines.NAME] one model under DeepSpeed."""

    ds_config: Path
    """DeepSpeed's own JSON: ZeRO, precision, gradient accumulation, gradient clipping."""
    ds_overrides: dict[str, Any] = Field(default={})
    """Keys that replace those of `ds_config`, table by table."""
    role: Literal["train", "teacher"] = "train"
    """"train", or "teacher": frozen, in eval mode, and never stepped."""
    optimizer: OptimizerConfig | None = None
    """Optimizer of a trained engine."""
    scheduler: SchedulerConfig | None = None
    """Learning-rate schedule; constant by default."""
    frozen: list[str] = Field(default=[])
    """Parameters that stay as they are: regular expressions for the whole names of parameters, or
    of modules with all that is in them, like "blocks\\.[0-3]"."""
    lora: LoraConfig | None = None
    """Train low-rank adapters, and leave all other parameters as they are."""
    init_from: Path | None = None
    """Weights to start from, instead of the task's: a .sft or .pt, a folder of Hugging Face's, an
    export or a checkpoint. Not read when a run resumes, except for a teacher."""
    every: int = Field(default=1, ge=1)
    """Train it at every so-many-th step of the run: 2 leaves out every other one."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Keep an exponential moving average of its weights, like 0.999: evaluations use it, and
    exports write it besides as NAME.ema."""

    @field_validator("frozen")
    @classmethod
    def _are_patterns(cls, frozen: list[str]) -> list[str]:
        return [pattern(text) for text in frozen]

    @model_validator(mode="after")
    def _possible(self) -> "EngineConfig":
        ds = self.deepspeed()
        for key, instead in _OURS.items():
            if key in ds:
                raise ValueError(f"{self.ds_config}: {key!r} is set by harness: {instead}")
        for table in ("bf16", "bfloat16", "fp16"):
            found = ds.get(table, {})
            if not isinstance(found, Mapping):
                raise ValueError(
                    f"{self.ds_config}: {table}: found {found!r}, expected a table, like "
                    "{'enabled': true}"
                )
            for key in _ROUNDED if self.ema_decay else ():
                if found.get(key):
                    raise ValueError(
                        f"{self.ds_config}: {table}.{key}: with ema_decay it must be false: "
                        "rounded to 16 bits, an average hardly moves"
                    )
        zero = ds.get("zero_optimization", {})
        stage = zero.get("stage", 0) if isinstance(zero, Mapping) else None
        if stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_optimization: found {zero!r}, expected {{'stage': 0 to 3}}")
        if zero.get("elastic_checkpoint"):
            raise ValueError(
                "zero_optimization.elastic_checkpoint: leave it out; without it, too, a run "
                "resumes on any number of ranks"
            )
        checkpoint = ds.get("checkpoint", {})
        if isinstance(checkpoint, Mapping) and checkpoint.get("use_node_local_storage"):
            raise ValueError(
                "checkpoint.use_node_local_storage: leave it out; whether each node has a disk of "
                "its own is found out"
            )
        for key in ("offload_optimizer", "offload_param"):
            place = zero.get(key)
            on_nvme = isinstance(place, Mapping) and place.get("device") == "nvme"
            if self.role == "train" and on_nvme:
                raise ValueError(
                    f"zero_optimization.{key}.device = 'nvme': a checkpoint would lack what is "
                    "there; use 'cpu'"
                )
            if self.init_from is not None and on_nvme:
                raise ValueError(f"zero_optimization.{key}.device = 'nvme': init_from needs 'cpu'")
        accumulation = ds.get("gradient_accumulation_steps", 1)
        if type(accumulation) is not int or accumulation < 1:
            raise ValueError(
                f"gradient_accumulation_steps: found {accumulation!r}, expected a number from 1 on"
            )
        if self.role == "train" and self.optimizer is None:
            raise ValueError("a trained engine needs an optimizer, for example {name = 'adamw'}")
        if self.role == "teacher" and (self.optimizer or self.scheduler):
            raise ValueError("a teacher is never stepped: it takes no optimizer and no scheduler")
        given = (self.every > 1, self.ema_decay, self.frozen, self.lora)
        if self.role == "teacher" and any(given):
            raise ValueError(
                "a teacher never changes: it takes no `every`, no ema_decay, no `frozen`, no `lora`"
            )
        offload = zero.get("offload_optimizer")
        if self.ema_decay and isinstance(offload, Mapping) and offload.get("ratio", 1.0) != 1.0:
            raise ValueError(
                "ema_decay: DeepSpeed steps a part of the parameters with an optimizer of its own: "
                "set zero_optimization.offload_optimizer.ratio to 1.0"
            )
        if self.role == "teacher" and stage in (1, 2):
            raise ValueError(
                f"a teacher cannot use ZeRO stage {stage}, which shards what an optimizer holds; "
                "use stage 0, or 3 to shard the weights"
            )
        return self

    @property
    def gradient_accumulation(self) -> int:
        """Micro-batches of one optimizer step."""
        return self.deepspeed().get("gradient_accumulation_steps", 1)

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage, 0 to 3."""
        return self.deepspeed().get("zero_optimization", {}).get("stage", 0)

    def deepspeed(self) -> dict[str, Any]:
        """`ds_config` with `ds_overrides` merged in. Raises ValueError if it cannot be read."""
        try:
            base = json.loads(self.ds_config.read_text())
        except OSError as error:
            raise ValueError(f"ds_config {self.ds_config}: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"ds_config {self.ds_config} is not JSON: {error}") from None
        if not isinstance(base, dict):
            raise ValueError(f"ds_config {self.ds_config}: expected a JSON object")
        return merge(base, self.ds_overrides)


_OURS = {
    "optimizer": "use engines.NAME.optimizer",
    "scheduler": "use engines.NAME.scheduler",
    "train_batch_size": "it follows from data.micro_batch_size and gradient_accumulation_steps",
    "train_micro_batch_size_per_gpu": "use data.micro_batch_size",
}

_ROUNDED = (
    "bf16_master_weights_and_grads",
    "bf16_optimizer_states",
    "fp16_master_weights_and_grads",
)
"""DeepSpeed's keys that keep masters or the optimizer's state in 16 bits."""
