"""Low-rank adapters next to a model's frozen weights, by peft (extra: lora).

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021. The layers are peft's,
injected in place: the model keeps its class, its forward and its attributes.
"""

import importlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.config.engine_sections import LoraConfig
from harness.errors import CheckpointError, ConfigError
from harness.io import save
from harness.wrapper import disable_encoder_fast_path

ADAPTER = "default"
"""peft's name for the only adapter."""

_ADAPTER_WEIGHT = re.compile(rf"(.+)\.lora_(?:embedding_)?[AB]\.{ADAPTER}(?:\.|$)")


def adapt(model: nn.Module, settings: LoraConfig) -> list[str]:
    """Freezes the model, and adds adapters to the layers that match. Returns their names.

    A weight W [out, in] then acts as W + alpha / rank * B A, with trained A [rank, in], random at
    first, and B [out, rank], zero at first. Raises ConfigError if no layer matches, or one that
    cannot be adapted: of a class that peft does not support, without a `weight`, or with a tied
    weight, which merging would change for one name only; a submodule of `nn.MultiheadAttention`,
    which uses weights without calling submodules; a convolution or embedding with a setting that
    peft's adapter (tuners/lora/layer.py) ignores. A model that has such adapters already, of an
    earlier run, keeps them; ConfigError if they are others.
    """
    peft = _peft()
    names: dict[Tensor, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter].append(name)
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=settings.targets,
        lora_dropout=settings.dropout,
    )
    if earlier := getattr(model, "peft_config", {}).get(ADAPTER):
        return _kept(model, earlier, config)
    try:
        peft.inject_adapter_in_model(config, model, ADAPTER)
    except (ValueError, TypeError, NotImplementedError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"lora.targets = {settings.targets!r}: {text:.400}") from None
    layers = _layers(model)
    for name, layer in layers.items():
        parent = model.get_submodule(name.rpartition(".")[0])
        if reason := _unsupported(layer.base_layer, parent, names):
            raise ConfigError(f"lora.targets: {name!r} {reason}")
    disable_encoder_fast_path(model)
    return list(layers)


def check_alpha(engine: str, alpha: float | None, saved: float | None) -> None:
    """Raises CheckpointError if the adapters of a checkpoint were trained with another alpha."""
    if alpha != saved:
        raise CheckpointError(
            f"engine {engine!r}: lora.alpha is {alpha} in the config, and {saved} in the "
            "checkpoint, whose adapters were trained with it: restore the old value, or set "
            "run.resume_changed = 'fit' to continue with the new one, or start a new run under "
            "another run.name"
        )


def _kept(model: nn.Module, earlier: Any, wanted: Any) -> list[str]:
    """The names of the layers that are adapted already; all but the adapters is frozen again.
    Raises ConfigError if `earlier` settings are not the `wanted` ones."""
    for key in ("r", "lora_alpha", "target_modules", "lora_dropout"):
        if (found := getattr(earlier, key)) != (expected := getattr(wanted, key)):
            raise ConfigError(
                f"lora: the model already has adapters, with {key} = {found!r} and not "
                f"{expected!r}: build it again, or give the Task a function that builds it"
            )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(bool(_ADAPTER_WEIGHT.match(name)))
    return list(_layers(model))


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """The names of a model's entries as they are without adapters, by those that they have;
    adapters keep theirs."""
    names = list(names)
    layers = {match[1] for match in map(_ADAPTER_WEIGHT.match, names) if match}
    plain = {}
    for name in names:
        layer, is_base, rest = name.rpartition(".base_layer.")
        plain[name] = f"{layer}.{rest}" if is_base and layer in layers else name
    return plain


def base_weights(model: nn.Module, entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of an adapted model's state dict without the adapters, under the model's own
    names."""
    names = {f"{name}.base_layer.": f"{name}." for name in _layers(model)}
    base = {}
    for key, tensor in entries.items():
        inner = next((name for name in names if key.startswith(name)), None)
        if inner is not None:
            base[names[inner] + key.removeprefix(inner)] = tensor
        elif not any(key.startswith(outer) for outer in names.values()):
            base[key] = tensor
    return base


@torch.no_grad()
def merged(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Plain weights under the model's own names, with the adapters merged.

    `state`: the full state dict of the adapted model; `model` itself may be sharded.
    """
    plain = base_weights(model, state)
    for name, layer in _layers(model).items():
        own = {
            f"layer.{key}": state[f"{name}.{key}"].float() for key, _ in layer.named_parameters()
        }
        delta = torch.func.functional_call(_Delta(layer), own, ())
        weight = plain[f"{name}.weight"]
        plain[f"{name}.weight"] = (weight.float() + delta).to(weight.dtype)
    return plain


def save_adapters(model: nn.Module, state: Mapping[str, Tensor], directory: Path) -> None:
    """Writes only the adapters, as `peft.PeftModel.from_pretrained` loads them.

    `state`: as for `merged`. Raises OSError.
    """
    adapted: Any = model
    adapters = _peft().get_peft_model_state_dict(
        adapted, state_dict=dict(state), adapter_name=ADAPTER, save_embedding_layers=False
    )
    base: dict[str, Any] = {}
    if path := getattr(model, "name_or_path", None):  # a model of transformers: AutoPeftModel's
        kind = type(model)
        names = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
        base = {"base_model_name_or_path": path, "auto_mapping": names}
    config = replace(adapted.peft_config[ADAPTER], inference_mode=True, **base)
    config.save_pretrained(str(directory))
    tensors = {f"base_model.model.{name}": tensor for name, tensor in adapters.items()}
    save(tensors, directory / "adapter_model.safetensors")


class _Delta(nn.Module):
    """What an adapter adds to the weight of its layer."""

    def __init__(self, layer: Any):
        super().__init__()
        self.layer = layer

    def forward(self) -> Tensor:
        return self.layer.get_delta_weight(ADAPTER)


def _layers(model: nn.Module) -> dict[str, Any]:
    """The adapted layers by name."""
    kind = importlib.import_module("peft.tuners.lora").LoraLayer
    return {name: m for name, m in model.named_modules() if isinstance(m, kind)}


def _peft() -> Any:
    return importlib.import_module("peft")  # late: it takes seconds


def _unsupported(layer: nn.Module, parent: nn.Module, names: Mapping[Tensor, list[str]]) -> str:
    """Why a layer cannot be adapted; an empty string if it can. `names`: of all parameters."""
    weight = layer._parameters.get("weight")
    if not isinstance(weight, nn.Parameter):
        return f"is a {type(layer).__name__}, which has no `weight`"
    if isinstance(parent, nn.MultiheadAttention):
        return (
            "is a submodule of nn.MultiheadAttention, which uses its weight without calling it: "
            "remove it from the targets"
        )
    if len(names[weight]) > 1:
        return (
            f"is tied: {', '.join(names[weight])} are one tensor, and an adapter would make them "
            "differ: remove it from the targets"
        )
    expected: dict[str, Any] = {}
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        ones = (1,) * len(layer.kernel_size)
        expected = {"groups": 1, "dilation": ones, "padding_mode": "zeros"}
    elif isinstance(layer, nn.Embedding):
        expected = {"max_norm": None}
    for key, value in expected.items():
        if (actual := getattr(layer, key)) != value:
            return (
                f"has {key} = {actual!r}, which peft's adapter does not support: remove it from "
                "the targets"
            )
    return ""
