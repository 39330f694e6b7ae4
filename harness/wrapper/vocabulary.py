"""A larger vocabulary: more rows for embeddings and output heads."""

import re
from collections import defaultdict

import torch
from torch import Tensor, nn

from harness.errors import ConfigError
from harness.wrapper.replacement import ModuleChange
from harness.zero.parameters import is_sharded

Holders = dict[Tensor, dict[str, nn.Module]]
"""By parameter: the modules that have it directly, by name."""


@torch.no_grad()
def resize_modules(model: nn.Module, include: str, size: int) -> list[ModuleChange]:
    """Grows a vocabulary: adds rows to the embeddings and linear heads whose names match.

    `include`: a regular expression for full names. Weights [rows, width] and biases [rows] become
    [size, ...]. Old rows are unchanged; each new one is the mean of the old ones, so that a new
    token starts with an average probability (Hewitt, "Initializing New Word Embeddings for
    Pretrained Language Models", 2021). Tied weights and biases stay tied, and all modules that
    share one of them grow with it. Build the optimizer afterwards. Raises ConfigError, with the
    model unchanged, if nothing matches, or if a module is neither an Embedding nor a Linear, would
    shrink, or is sharded by ZeRO.
    """
    holders: Holders = defaultdict(dict)
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders[parameter][name] = module
    chosen = {n: m for n, m in model.named_modules() if re.fullmatch(include, n)}
    if not chosen:
        raise ConfigError(f"resize: {include!r} matches no module of {type(model).__name__}")
    chosen = _with_tied(chosen, holders)
    for name, module in chosen.items():
        _check(name, module, size)
    grown: dict[nn.Parameter, nn.Parameter] = {}
    changes = []
    for name, module in chosen.items():
        for old in module._parameters.values():
            if old is not None and old not in grown:
                grown[old] = _grown(old, size)
        rows = "num_embeddings" if isinstance(module, nn.Embedding) else "out_features"
        changes.append(ModuleChange(name, f"{getattr(module, rows)} rows", f"{size} rows"))
        setattr(module, rows, size)
    for old, new in grown.items():
        for holder in holders[old].values():
            for key, parameter in holder._parameters.items():
                if parameter is old:
                    holder._parameters[key] = new
    return changes


def _with_tied(chosen: dict[str, nn.Module], holders: Holders) -> dict[str, nn.Module]:
    """The chosen modules, and those that share a weight or bias with one of them."""
    chosen = dict(chosen)
    waiting = [*chosen.values()]
    while waiting:
        module = waiting.pop()
        if isinstance(module, nn.Embedding | nn.Linear):
            tied = dict(holders[module.weight])
            if (bias := module._parameters.get("bias")) is not None:
                tied |= {n: m for n, m in holders[bias].items() if isinstance(m, nn.Linear)}
            waiting += [tied[name] for name in tied.keys() - chosen.keys()]
            chosen |= tied
    return chosen


def _check(name: str, module: nn.Module, size: int) -> None:
    """Raises ConfigError if a module cannot have `size` rows."""
    if not isinstance(module, nn.Embedding | nn.Linear):
        raise ConfigError(
            f"resize: {name!r} is a {type(module).__name__}, expected an Embedding or a Linear"
        )
    if is_sharded(module.weight):
        raise ConfigError(f"resize: {name!r} is already sharded by ZeRO: resize it before")
    if size < len(module.weight):
        raise ConfigError(f"resize: {name!r} has {len(module.weight)} rows, more than {size}")


def _grown(old: nn.Parameter, size: int) -> nn.Parameter:
    """The old rows, followed by copies of their mean up to `size` rows."""
    mean = old.float().mean(0, keepdim=True).to(old.dtype)
    new = torch.cat([old, mean.expand(size - len(old), *old.shape[1:])])
    return nn.Parameter(new, requires_grad=old.requires_grad)
