"""The model that is planned for: from sizes, an import path, a Hugging Face config, or a task."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.config import Config
from harness.config.deepspeed_rules import half_precision, value_at
from harness.config.engine_sections import OptimizerConfig
from harness.config.load import load
from harness.engine.attributes import Submodules
from harness.engine.lora import adapt
from harness.engine.turns import frozen
from harness.errors import ConfigError, did_you_mean
from harness.huggingface.models import describe
from harness.sizing.activations import Activations, Models, call, trace
from harness.sizing.llama import Llama
from harness.sizing.setting import OPTIMIZERS, Setting
from harness.task import Task, load_task
from harness.utils import import_path
from harness.wrapper import freeze


@dataclass(frozen=True)
class Subject:
    """A model on the meta device, and what its forward is called with."""

    title: str
    model: nn.Module
    batch: Callable[[Setting], Any]
    forward: Callable[[nn.Module, Any, Models], Any] = call
    others: Callable[[], Mapping[str, tuple[nn.Module, str]]] = dict
    """The run's other models, which the forward may go through, and their precision."""
    optimizer: OptimizerConfig | None = None
    """Of a run: with its options and groups."""
    keeps_ema: bool = False
    """Whether the run keeps an EMA of the trained weights."""

    def activations(self, setting: Setting) -> Activations:
        """Of one micro-batch. Raises ConfigError if the forward fails."""
        try:
            batch = self.batch(setting)
            return trace(self.model, batch, setting.precision, self.forward, self.others())
        except Exception as error:  # the user's code may raise anything
            raise ConfigError(
                f"{self.title}: its forward could not be traced: {type(error).__name__}: {error}; "
                "--no-activations plans without them"
            ) from error


def token_ids(setting: Setting) -> dict[str, torch.Tensor]:
    """A batch of a language model: [micro_batch, seq_len]."""
    ids = torch.zeros(setting.micro_batch, setting.seq_len, dtype=torch.long, device="meta")
    return {"input_ids": ids, "labels": ids}


def from_sizes(sizes: Mapping[str, int]) -> Subject:
    """A LLaMA of `layers`, `hidden`, `heads`, `ffn`, `vocabulary`, and maybe `kv_heads`."""
    for name in ("layers", "hidden", "heads", "ffn", "vocabulary"):
        if sizes.get(name, 0) < 1:
            raise ConfigError(f"--{name}: expected a number >= 1; a shape needs all five sizes")
    heads = sizes["heads"]
    if sizes["hidden"] % (2 * heads):
        raise ConfigError(f"--hidden {sizes['hidden']}: expected a multiple of 2 x {heads} heads")
    if sizes.get("kv_heads") and heads % sizes["kv_heads"]:
        raise ConfigError(f"--kv-heads {sizes['kv_heads']}: does not divide {heads} heads")
    with torch.device("meta"):
        model = Llama(**sizes)
    return Subject("LLaMA shape", model, token_ids)


def from_import_path(path: str) -> Subject:
    """The model that `module:function` returns: alone, then it is called with token ids as its only
    argument; or with the inputs of a call, `(model, dict or tuple)`. Raises ConfigError."""
    build = import_path(path)
    if not callable(build):
        raise ConfigError(f"{path}: expected a function, found {type(build).__name__}")
    model = _built(build, path)
    if isinstance(model, tuple) and len(model) == 2:
        model, inputs = model
        return Subject(path, _checked(model, path), lambda _: inputs)
    return Subject(path, _checked(model, path), lambda s: (token_ids(s)["input_ids"],))


def from_folder(path: Path) -> Subject:
    """The model of a Hugging Face config. Raises ConfigError."""
    description = describe(path)
    model = _checked(_built(description.build, str(path)), str(path))
    return Subject(str(path), model, token_ids)


def from_task(path: Path, engine: str | None, overrides: dict[str, Any]) -> tuple[Subject, Setting]:
    """An engine's model and setting from a config file; `overrides` replace what the file says.
    Raises ConfigError."""
    config = load(path)
    trained = [name for name, e in config.engines.items() if e.role == "train"]
    name = engine or trained[0]
    if name not in trained:
        hint = did_you_mean(name, trained)
        raise ConfigError(f"{path}: no trained engine {name!r}{hint}; it has {', '.join(trained)}")
    setting = setting_of(config, name, overrides)
    return of_task(load_task(config), config, name, f"{path}, engine {name}"), setting


def of_task(task: Task, config: Config, name: str, title: str) -> Subject:
    """The model of an engine, with its adapters and what is frozen; the task's is left as it is.
    Raises ConfigError."""
    engine = config.engines[name]
    model = _model_of(task, name, title)

    def batch(setting: Setting) -> Any:
        data = task.train_data
        if not hasattr(data, "__getitem__") or isinstance(data, Mapping):
            raise ConfigError("train_data is not a map-style dataset")
        return task.collate([data[index] for index in range(setting.micro_batch)])

    meta = _checked(model, title)
    if engine.lora is not None:
        adapt(meta, engine.lora)
    freeze(meta, engine.frozen)
    meta = _checked(meta, title).to("meta")
    return Subject(
        title,
        meta,
        batch,
        lambda model, batch, others: task.feeder(_Fed(name, model, _Peers(others)), batch),
        lambda: _others(task, config, name, title),
        engine.optimizer,
        engine.ema_decay is not None,
    )


def _model_of(task: Task, name: str, title: str) -> Any:
    """A task's model, without memory for its tensors."""
    built = task.models[name]
    return _on_meta(built) if isinstance(built, nn.Module) else _built(built, title)


def _others(task: Task, config: Config, name: str, title: str) -> dict[str, tuple[nn.Module, str]]:
    """The models of all engines but this one, in their modes, each with its precision."""
    others = {}
    for other, engine in config.engines.items():
        if other != name:
            model = _model_of(task, other, title)
            if engine.lora is not None:
                adapt(model, engine.lora)
            model.train(engine.role == "train")
            others[other] = model, half_precision(engine.deepspeed()) or "fp32"
    return others


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy of a model, without memory for its tensors."""
    with torch.no_grad():
        copies: dict[int, Any] = {
            id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()
        }
        copies |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    return deepcopy(model, copies)


def setting_of(config: Config, name: str, overrides: Mapping[str, Any] | None = None) -> Setting:
    """How a config trains an engine, on one rank; `overrides` replace what it says. Raises
    ConfigError for an optimizer whose state is not known."""
    engine = config.engines[name]
    ds = engine.deepspeed()
    assert engine.optimizer is not None
    optimizer = (overrides or {}).get("optimizer", engine.optimizer.name)
    if optimizer not in OPTIMIZERS:
        raise ConfigError(
            f"engines.{name}.optimizer: the state of {optimizer!r} is not known, only that of "
            f"{', '.join(OPTIMIZERS)}: `harness plan --engine {name} --optimizer NAME` plans with "
            "one of these"
        )
    on_host = [
        value_at(ds, f"zero_optimization.offload_{what}.device") == "cpu"
        for what in ("optimizer", "param")
    ]
    setting = Setting(
        stage=engine.zero_stage,
        offload="all" if on_host[1] else "optimizer" if on_host[0] else "none",
        optimizer=optimizer,
        precision=half_precision(ds) or "fp32",
        micro_batch=config.data.micro_batch_size,
        accumulation=engine.gradient_accumulation,
    )
    return replace(setting, **overrides or {})


class _Peers:
    """The part of `Engines` that feeders use."""

    def __init__(self, models: Models):
        self._models = models

    @contextmanager
    def lend(self, name: str) -> Iterator[nn.Module]:
        with frozen(self._models[name]) as model:
            yield model


class _Fed:
    """The part of an engine that feeders use."""

    device = torch.device("cpu")

    def __init__(self, name: str, model: nn.Module, peers: _Peers):
        self.name, self.module, self.peers = name, model, peers
        self.dtype = next(model.parameters()).dtype
        self.gather_attribute = Submodules(model).gather

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def _built(build: Callable[[], Any], title: str) -> Any:
    try:
        with torch.device("meta"):
            return build()
    except ConfigError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise ConfigError(
            f"{title}: could not be built on the meta device: {type(error).__name__}: {error}"
        ) from error


def _checked(model: Any, title: str) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{title}: expected an nn.Module, found {type(model).__name__}")
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(f"{title}: the model has no trainable parameters")
    return model
