"""The tables of a config file, and what each of their keys may be.

Nothing here imports torch, so that a mistake in the config is reported within a second.
"""

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

LIVE: dict[str, Any] = {"live": True}
"""Marks a key that `set KEY VALUE` can change while the run goes on."""


class Section(BaseModel):
    """A table of the TOML file: unknown keys are errors, docstrings are the `--help`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class RunConfig(Section):
    """[run] what the run is called, how long it goes on, and what it starts from."""

    name: str = Field(default="", pattern=r"^(\w[\w.-]*)?$")
    """Name of the run; its directory is DIR/NAME. Default: the config file's name."""
    dir: Path = Path("runs")
    """Where run directories are made."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the models' initial weights, of the data order, and (with the rank) of dropout."""
    steps: int = Field(default=1000, ge=1, json_schema_extra=LIVE)
    """Optimizer steps of the whole run, those before a resume included."""
    resume: str = "latest"
    """"latest": go on from the run's newest checkpoint, if any; "none": start over; or a
    checkpoint's path."""
    timeout_s: float = Field(default=1800.0, gt=0, le=1e8)
    """Seconds after which a collective that some rank does not join ends the run."""


class TaskConfig(Section):
    """[task] the user's code."""

    path: str
    """A Python file, or an importable module, with one function `build(config) -> Task`."""
    args: dict[str, Any] = {}
    """The task's own arguments; `build` finds them as `config.task.args`."""

    @field_validator("path")
    @classmethod
    def _exists(cls, path: str) -> str:
        if path.endswith(".py"):
            if not Path(path).is_file():
                raise ValueError(f"no such file: {Path(path).absolute()}")
            if "." in Path(path).stem:
                raise ValueError(f"Python cannot import a file with a dot in its name: {path}")
        elif "/" in path or not importable(path):
            raise ValueError("neither a .py file nor an importable module")
        return path


class DataConfig(Section):
    """[data] from a dataset to the micro-batches of a rank. Not used for a task's own loaders."""

    micro_batch_size: int = Field(default=8, ge=1)
    """Samples in a micro-batch of one rank (at most so many with the "batched" sampler)."""
    sampler: Literal["random", "ordered", "pool", "batched"] = "random"
    """Order of the training samples; "batched" packs samples of like length, and needs
    `train_data.lengths`."""
    max_tokens: int = Field(default=0, ge=0)
    """"batched" only: longest sample x samples of a micro-batch, at most; 0 is no limit."""
    buckets: int = Field(default=8, ge=1)
    """"batched" only: groups of like length that samples are shuffled within."""
    workers: int = Field(default=0, ge=0)
    """Processes of each rank that load samples; 0 loads them in the rank itself."""

    @model_validator(mode="after")
    def _possible(self) -> "DataConfig":
        if self.max_tokens and self.sampler != "batched":
            raise ValueError(f"max_tokens needs sampler = 'batched', found {self.sampler!r}")
        return self


class TrainerConfig(Section):
    """[trainer] what happens between the steps."""

    save_every: int = Field(default=0, ge=0, json_schema_extra=LIVE)
    """Steps between checkpoints; 0: only at the end and on command."""
    eval_every: int = Field(default=0, ge=0, json_schema_extra=LIVE)
    """Steps between evaluations, the first before step 1; 0: only at the end and on command."""
    export_every: int = Field(default=0, ge=0, json_schema_extra=LIVE)
    """Steps between exports of plain weights; 0: only at the end and on command."""
    save_on_quit: bool = Field(default=True, json_schema_extra=LIVE)
    """Save when the run ends, or is told to quit."""
    export_on_quit: bool = Field(default=True, json_schema_extra=LIVE)
    """Export when the run ends, or is told to quit."""


class CheckpointConfig(Section):
    """[checkpoint] how checkpoints are written, and which of them stay."""

    keep_last: int = Field(default=0, ge=0, json_schema_extra=LIVE)
    """Newest checkpoints to keep; 0 keeps all. Pinned ones (`save as NAME`) stay in any case."""
    keep_best: int = Field(default=0, ge=0, json_schema_extra=LIVE)
    """Best checkpoints to keep besides, among those with an evaluation at their step."""
    best_metric: str = Field(default="eval/loss", json_schema_extra=LIVE)
    """The number of the evaluation that says which is best."""
    best: Literal["lowest", "highest"] = Field(default="lowest", json_schema_extra=LIVE)
    """Whether a low or a high number is good."""
    keep_every: int = Field(default=0, ge=0, json_schema_extra=LIVE)
    """Keep besides the checkpoints whose step is a multiple of this; 0: none."""
    background: bool = Field(default=False, json_schema_extra=LIVE)
    """Write behind the training: a step is held up only while the tensors are copied."""
    on_error: Literal["continue", "stop"] = Field(default="continue", json_schema_extra=LIVE)
    """What a failed save does to the run. The next save tries again."""

    @model_validator(mode="after")
    def _possible(self) -> "CheckpointConfig":
        if not self.keep_last and (self.keep_best or self.keep_every):
            raise ValueError("keep_best and keep_every need keep_last: without it all are kept")
        return self


class OffloadConfig(Section):
    """[optimizations.offload] which activations wait in host memory, if `unsloth` is true."""

    match: str = ""
    """Regular expression for the names of the modules that are blocks, for example
    "model\\.layers\\.\\d+"; by default the largest list of modules of one class is taken."""
    mode: Literal["inputs", "saved"] = "inputs"
    """"inputs": blocks are recomputed in backward from inputs that waited in host memory; "saved":
    nothing is recomputed, and many times the bytes are moved."""
    budget: Literal["auto", "all"] | float = "auto"
    """How many of the blocks are offloaded: "auto", as many as the device's memory makes necessary;
    "all"; or a part, from 0 to 1."""
    keep_last: int = Field(default=1, ge=0)
    """Blocks at the end whose tensors stay on the device, as backward wants them at once."""
    min_bytes: int = Field(default=2 * 2**20, ge=0)
    """Smaller tensors stay on the device."""
    host_budget: int = Field(default=0, ge=0)
    """Bytes of pinned host memory of one rank, at most; 0: its share of half of what is free."""

    @field_validator("match")
    @classmethod
    def _is_pattern(cls, match: str) -> str:
        return pattern(match)

    @field_validator("budget")
    @classmethod
    def _is_part(cls, budget: str | float) -> str | float:
        if not isinstance(budget, str) and not 0 <= budget <= 1:
            raise ValueError(f"found {budget}, expected 'auto', 'all', or a part from 0 to 1")
        return budget


ADAPTERS = {
    "harness.wrapper.layers.torchao": ("torchao", "quant"),
    "harness.wrapper.layers.bitsandbytes": ("bitsandbytes", "quant"),
    "harness.wrapper.layers.transformer_engine": ("transformer_engine", "te"),
}
"""Package and extra that the layers of a module need."""


class ReplaceConfig(Section):
    """[[optimizations.replace]] modules of one class, in whose place come others."""

    what: str = Field(pattern=r"^[\w.]+:\w+$")
    """Import path of the class of the modules, like "torch.nn:Linear"; its subclasses stay."""
    by: str = Field(pattern=r"^[\w.]+:\w+$")
    """Import path of a subclass, like "harness.wrapper.layers.bitnet:BitLinear", or of a
    function that makes a new module from the old one, like
    "harness.wrapper.layers.torchao:float8_linear"."""
    include: str = ".*"
    """Regular expression for the whole names of the modules."""
    exclude: str = ""
    """Regular expression for those that stay."""
    engine: str = ""
    """The engine whose model it is; by default every one."""

    @field_validator("by")
    @classmethod
    def _installed(cls, by: str) -> str:
        package, extra = ADAPTERS.get(by.partition(":")[0], ("", ""))
        if package and not importable(package):
            raise ValueError(f"{package} is not installed: pip install 'harness[{extra}]'")
        return by

    @field_validator("include", "exclude")
    @classmethod
    def _is_pattern(cls, match: str) -> str:
        return pattern(match)


class OptimizationsConfig(Section):
    """[optimizations] what makes models smaller or faster; all but `replace` leave what they
    compute as it is."""

    unsloth: bool = False
    """Activations of trained models wait in host memory until backward (docs/offload.md)."""
    offload: OffloadConfig = OffloadConfig()
    """How, where the defaults do not fit."""
    replace: list[ReplaceConfig] = []
    """Other modules in the models' place, one entry after the other (docs/replace.md)."""
    compile: bool | Literal["blocks"] = False
    """torch.compile: true, each model as a whole; "blocks", its repeated blocks one by one, which
    is compiled once for all of them. Not at ZeRO stage 3."""
    attention: Literal["any", "math", "flash", "efficient", "cudnn"] = "any"
    """The only back end that torch's scaled_dot_product_attention may use."""


class ControlConfig(Section):
    """[control] live commands."""

    stdin: bool = True
    """Read commands from rank 0's standard input."""
    socket: bool = True
    """Take commands from `harness ctl`, through a socket in the run directory."""


class MetricsConfig(Section):
    """[metrics] what is shown, and where numbers go besides metrics.jsonl."""

    progress: bool = True
    """Show a progress bar on rank 0."""
    tensorboard: bool = False
    """Write TensorBoard events below the run directory (extra: tensorboard)."""

    @field_validator("tensorboard")
    @classmethod
    def _installed(cls, wanted: bool) -> bool:
        if wanted and not importable("tensorboard"):
            raise ValueError("not installed: pip install 'harness[tensorboard]'")
        return wanted


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over` in place of its own, table by table."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = merge(old, value)
        merged[key] = value
    return merged


def pattern(text: str) -> str:
    """The text. Raises ValueError if it is no regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is no regular expression: {error}") from None
    return text


def importable(module: str) -> bool:
    """Whether a module can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
