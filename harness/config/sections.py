"""The tables of a config file, except the engines': keys, values and defaults."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from harness.config.old_names import current_import_path
from harness.config.paths import UserPath, expand_path
from harness.errors import compile_pattern

LIVE: dict[str, Any] = {"live": True}
"""Marks a key that `set KEY VALUE` can change during a run."""


def _step_or_path(value: Any) -> Any:
    """`run.resume`: a step is also accepted as a number of TOML."""
    return str(value) if type(value) is int else expand_path(value)


class Section(BaseModel):
    """A table of the TOML file: unknown keys are errors, docstrings are the `--help`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic takes true for 1."""
        kind = cls.model_fields[info.field_name or ""].annotation
        is_number = {int, float} & {kind, *get_args(kind)} and get_origin(kind) is not list
        if isinstance(value, bool) and is_number:
            raise ValueError(f"expected a number, found {str(value).lower()}")
        return value


class RunConfig(Section):
    """[run] name, directory and length of the run, and what it resumes from."""

    name: str = Field(default="", pattern=r"^(\w[\w.-]*)?$")
    """Name of the run; its directory is DIR/NAME. Default: the config file's name."""
    dir: UserPath = Path("runs")
    """Parent of the run directories."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the models' initial weights, of the data order, and (with the rank) of dropout."""
    steps: int = Field(default=1000, ge=1, json_schema_extra=LIVE)
    """Optimizer steps of the complete run, including those before a resume."""
    epochs: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Instead of `steps`: passes over the training data, also parts of one. Counted at each start
    in steps of its own batch size. For data with an index, and micro-batches of one size."""
    resume: Annotated[str, BeforeValidator(_step_or_path)] = "latest"
    """"latest": resume from the run's newest checkpoint, if any; "none": start over; a step of
    the run; or a path: of a checkpoint, or of a run directory, whose newest checkpoint is meant."""
    resume_changed: Literal["refuse", "fit"] = "refuse"
    """A checkpoint of another model, `frozen`, `lora` or dataset: it is refused, or what fits is
    kept, the rest reset, and both are listed."""
    timeout_s: float = Field(default=1800.0, gt=0, le=1e8)
    """Timeout of collectives, in seconds; after it the run ends."""
    deepspeed_log: Literal["debug", "info", "warning", "error"] = "warning"
    """What DeepSpeed itself logs on the terminal, from this level on. Its launcher has an option,
    `deepspeed --quiet`."""

    @model_validator(mode="after")
    def _has_one_length(self) -> "RunConfig":
        if self.epochs is not None and "steps" in self.model_fields_set:
            raise ValueError(
                f"steps = {self.steps} and epochs = {self.epochs:g} are both set: remove one"
            )
        return self


class TaskConfig(Section):
    """[task] the user's code."""

    path: Annotated[str, BeforeValidator(expand_path)] = ""
    """A Python file, or an importable module, with one function `build(config) -> Task`. Required,
    unless `harness.train` is given the task."""
    args: dict[str, Any] = {}
    """Arguments for the task: `config.task.args` in `build`."""

    @field_validator("path")
    @classmethod
    def _exists(cls, path: str) -> str:
        if path.endswith(".py"):
            if not Path(path).is_file():
                raise ValueError(f"no such file: {Path(path).absolute()}")
            if "." in Path(path).stem:
                raise ValueError(f"{path}: Python cannot import a file with a dot in its name")
        elif path and ("/" in path or not importable(path)):
            raise ValueError(f"{path!r} is neither a .py file nor an importable module")
        return path


class MixConfig(Section):
    """[data.mix.NAME] one of several datasets that the task returns by name."""

    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False, json_schema_extra=LIVE)
    """Samples of this source in relation to those of the others; 0: none for now."""
    source: str = ""
    """Where the task finds it, if the task asks for that."""


class DataConfig(Section):
    """[data] how a dataset, or a stream of samples, becomes micro-batches. If the task returns
    a loader of batches, only `uneven` counts."""

    micro_batch_size: int = Field(default=8, ge=1)
    """Samples per micro-batch and rank (with the "batched" sampler: at most)."""
    sampler: Literal["random", "ordered", "pool", "batched"] = "random"
    """Order of the training samples; "batched" packs samples of similar length, and needs
    `train_data.lengths`."""
    max_tokens: int = Field(default=0, ge=0)
    """"batched" only: most tokens in a padded micro-batch (longest sample x samples); 0: no
    limit."""
    buckets: int = Field(default=8, ge=1)
    """"batched" only: number of length buckets, within which samples are shuffled."""
    split: Literal["self", "stride"] = "self"
    """How a stream of samples is divided. "self": it yields other samples on each rank and in each
    worker. "stride": each of them reads it completely and takes its share, so that it resumes on
    any number of ranks and workers."""
    uneven: Literal["pad", "stop"] = "pad"
    """When ranks have more or fewer micro-batches in an epoch of a stream or of the task's loader.
    "pad": those that run out wait, with micro-batches that count for nothing. "stop": the epoch
    ends with the last micro-batch that all ranks have."""
    workers: int = Field(default=0, ge=0)
    """Data-loading processes per rank, in training and in evaluations; 0: samples are loaded in the
    rank's own process."""
    start_method: Literal["fork", "spawn", "forkserver"] = "fork"
    """How these processes start. With "spawn" and "forkserver" they inherit nothing of the rank,
    for libraries that a fork breaks; dataset and `collate` are pickled, so neither can be local."""

    on_error: Literal["stop", "skip"] = "stop"
    """What becomes of a sample whose `__getitem__` raises: the run stops, or its micro-batch is a
    sample smaller, and counts for so much less."""
    most_skipped: int = Field(default=16, ge=1)
    """With on_error = "skip": most samples in a row that a rank may skip; then the run stops."""

    mix: dict[str, MixConfig] = {}
    """Sources of a mixture, if `train_data` is a dict of datasets; default: samples of all sources
    equally often."""

    @model_validator(mode="after")
    def _fits_sampler(self) -> "DataConfig":
        if self.mix and self.sampler != "random":
            raise ValueError(f"mix needs sampler = 'random', found {self.sampler!r}")
        if self.mix and not any(source.weight for source in self.mix.values()):
            raise ValueError("mix: every weight is 0")
        if self.max_tokens and self.sampler != "batched":
            raise ValueError(f"max_tokens needs sampler = 'batched', found {self.sampler!r}")
        return self


class TrainerConfig(Section):
    """[trainer] when to save, evaluate and export."""

    save_every: int = Field(default=0, ge=0, json_schema_extra=LIVE)
    """Steps between checkpoints; 0: only at the end and on command."""
    eval_every: int = Field(default=0, ge=0, json_schema_extra=LIVE)
    """Steps between evaluations, the first before step 1; 0: only at the end and on command."""
    export_every: int = Field(default=0, ge=0, json_schema_extra=LIVE)
    """Steps between exports of plain weights; 0: only at the end and on command."""
    save_at_end: bool = Field(default=True, json_schema_extra=LIVE)
    """Save when the run ends, also by `quit`. A signal always saves."""
    export_at_end: bool = Field(default=True, json_schema_extra=LIVE)
    """Export when the run ends, also by `quit`. A signal never exports."""


class CheckpointConfig(Section):
    """[checkpoint] how checkpoints are written, and which are kept."""

    keep_last: int = Field(default=0, ge=0, json_schema_extra=LIVE)
    """Number of newest checkpoints to keep; 0: all. Pinned ones (`save as NAME`) always stay."""
    keep_best: int = Field(default=0, ge=0, json_schema_extra=LIVE)
    """Number of best checkpoints to keep as well, among those with an evaluation at their step."""
    best_metric: str = Field(default="eval/loss", json_schema_extra=LIVE)
    """The evaluation metric that ranks checkpoints: eval/NAME; with named sets eval/SET/NAME, with
    several engines eval/ENGINE/NAME or eval/SET/ENGINE/NAME."""
    best_mode: Literal["min", "max"] = Field(default="min", json_schema_extra=LIVE)
    """Whether the lowest or the highest `best_metric` is best."""
    keep_every: int = Field(default=0, ge=0, json_schema_extra=LIVE)
    """Also keep checkpoints whose step is a multiple of this; 0: none."""
    background: bool = Field(default=False, json_schema_extra=LIVE)
    """Write in the background: training waits only while the tensors are copied."""
    on_error: Literal["continue", "stop"] = Field(default="continue", json_schema_extra=LIVE)
    """What the run does after a failed save; if it continues, the next save retries."""
    replicas: Literal[0, 1] = 0
    """Where each node has its own disk: copies of each rank's files on another node's disk, sent
    while training goes on. 1: a node that is lost takes no checkpoint along that is safe."""
    in_memory_every: int = Field(default=0, ge=0)
    """Steps between states that are kept in host memory (/dev/shm), the newest one of each rank and
    of a rank of another node: what a run starts from again when its processes have died. 0: none.
    """
    remote: str = Field(default="", pattern=r"^([\w+.-]+://.+)?$")
    """URL of a store of objects, or of what else fsspec reaches, like "s3://bucket/runs": every
    checkpoint is uploaded below it, to NAME of the run, while training goes on."""
    remote_mb_per_s: float = Field(default=0.0, ge=0)
    """Limit of what each rank uploads and downloads, in MB (1e6 bytes) per second; 0: none."""

    @model_validator(mode="after")
    def _fits_keep_last(self) -> "CheckpointConfig":
        if not self.keep_last and (self.keep_best or self.keep_every):
            raise ValueError("keep_best and keep_every need keep_last: without it all are kept")
        return self


class OffloadConfig(Section):
    """[optimizations.offload] which activations to offload to host memory, if `unsloth` is true."""

    match: str = ""
    """Regular expression that matches the full names of the blocks, like "model\\.layers\\.\\d+".
    Default: the largest list of modules of one class."""
    mode: Literal["inputs", "saved"] = "inputs"
    """"inputs": offload only the blocks' inputs, and recompute the blocks in backward; "saved":
    offload all saved tensors, many times the bytes, and recompute nothing."""
    fraction: Literal["auto", "all"] | float = "auto"
    """Blocks to offload: "auto", as many as the device's memory requires; "all"; or a fraction from
    0 to 1."""
    keep_last: int = Field(default=1, ge=0)
    """Number of last blocks that stay on the device, as backward needs them first."""
    min_bytes: int = Field(default=2 * 2**20, ge=0)
    """Smaller tensors stay on the device."""
    host_bytes: int = Field(default=0, ge=0)
    """Limit of pinned host memory per rank, in bytes; 0: its share of half of the free memory."""

    @field_validator("match")
    @classmethod
    def _is_pattern(cls, match: str) -> str:
        return check_pattern(match)

    @field_validator("fraction")
    @classmethod
    def _is_fraction(cls, fraction: str | float) -> str | float:
        if not isinstance(fraction, str) and not 0 <= fraction <= 1:
            raise ValueError(f"found {fraction}, expected 'auto', 'all', or a number from 0 to 1")
        return fraction


LAYER_PACKAGES = {
    "harness.wrapper.layers.torchao": "torchao",
    "harness.wrapper.layers.bitsandbytes": "bitsandbytes",
    "harness.wrapper.layers.transformer_engine": "transformer_engine[pytorch]",
}
"""The pip requirement of each module of layers."""


class ReplaceConfig(Section):
    """[[optimizations.replace]] the modules of one class, and what replaces them."""

    what: str = Field(pattern=r"^[\w.]+:\w+$")
    """Import path of the class to replace, like "torch.nn:Linear"; its subclasses are kept."""
    by: str = Field(pattern=r"^[\w.]+:\w+$")
    """Import path of a subclass, like "harness.wrapper.layers.bitnet:BitLinear", or of a
    function that builds a new module from the old one, like
    "harness.wrapper.layers.torchao:float8_linear"."""
    include: str = ".*"
    """Regular expression that matches full names of modules to replace."""
    exclude: str = ""
    """Regular expression that matches full names of modules to keep."""
    engine: str = ""
    """Engine whose model is changed. Default: all engines."""

    @field_validator("what", "by")
    @classmethod
    def _current(cls, path: str) -> str:
        return current_import_path(path)

    @field_validator("by")
    @classmethod
    def _installed(cls, by: str) -> str:
        requirement = LAYER_PACKAGES.get(by.partition(":")[0], "")
        package = requirement.partition("[")[0]
        if package and not importable(package):
            raise ValueError(f"{package} is not installed: pip install {quote(requirement)}")
        return by

    @field_validator("include", "exclude")
    @classmethod
    def _is_pattern(cls, match: str) -> str:
        return check_pattern(match)


class OptimizationsConfig(Section):
    """[optimizations] make models smaller or faster; only `replace` changes results."""

    unsloth: bool = False
    """Offload activations of trained models to host memory until backward (docs/offload.md)."""
    offload: OffloadConfig = OffloadConfig()
    """Settings of `unsloth`."""
    replace: list[ReplaceConfig] = []
    """Modules to replace, applied in order (docs/replace.md)."""
    compile: bool | Literal["blocks"] = False
    """torch.compile: true compiles each model as a whole; "blocks" its repeated blocks, which share
    one compilation. Not at ZeRO stage 3."""
    attention: Literal["any", "math", "flash", "efficient", "cudnn"] = "any"
    """Restrict torch's scaled_dot_product_attention to this backend."""


class ControlConfig(Section):
    """[control] live commands."""

    stdin: bool = True
    """Read commands from rank 0's standard input."""
    socket: bool = True
    """Accept commands from `harness ctl`, through a socket in the run directory."""


class EventConfig(Section):
    """[[events]] a live command that is executed at some steps (docs/control.md)."""

    command: str
    """The command, like "export" or "save as half"."""
    every: int = Field(default=0, ge=0)
    """Execute it at the end of every step that is a multiple of this."""
    at: int = Field(default=0, ge=0)
    """Execute it at the end of this step."""

    @model_validator(mode="after")
    def _is_scheduled_once(self) -> "EventConfig":
        if bool(self.every) == bool(self.at):
            raise ValueError(f"every = {self.every}, at = {self.at}: expected one of them, above 0")
        return self


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base`, with `over` merged in recursively."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = merge(old, value)
        merged[key] = value
    return merged


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section in a field's type: itself, optional, or as the values of a table or list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(section_of, get_args(annotation))), None)


def check_pattern(text: str) -> str:
    """Returns the text. Raises ValueError if it is not a regular expression."""
    compile_pattern(text)
    return text


def importable(module: str) -> bool:
    """Whether a module can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
