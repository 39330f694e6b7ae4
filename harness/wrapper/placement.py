"""A model's modules over several devices, by size limits: for inference and evaluation.

place(model, plan(model, {"cuda:0": 20e9, "cuda:1": 20e9, "cpu": 200e9}))
"""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from harness.errors import ConfigError
from harness.offload import repeated_class


def plan(
    model: nn.Module, limits: Mapping[str, float], match: str | None = None
) -> dict[str, torch.device]:
    """Which device each part of a model goes to: its name, and the device. Moves nothing.

    - `limits`: bytes of parameters and buffers that a device may hold, the first choice first. What
      activations need is to be left free. The first device is home: what belongs to no part, like
      a parameter of the model itself, is there, under the name "".
    - `match`: a regular expression for the whole names of blocks, which are never divided; by
      default the largest list of modules of one class is taken.

    Parts are the blocks, and what stands beside them on the way up to the model. Each goes to the
    first device with room for it; parts that share a tensor go together. The model may be on
    "meta". Raises ConfigError if a part fits nowhere, `match` fits nothing, or ZeRO has sharded the
    model.
    """
    if not limits:
        raise ConfigError("placement: no device is given")
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ConfigError("placement: the model is sharded by ZeRO, which places it already")
    blocks = _blocks(model, match)
    parts = dict(_parts(model, "", blocks))
    inside = {id(tensor) for part in parts.values() for tensor in _tensors(part)}
    rest = [tensor for tensor in _tensors(model) if id(tensor) not in inside]
    groups = _tied({"": rest} | {name: _tensors(part) for name, part in parts.items()})
    left = dict(limits)
    home = next(iter(limits))
    places: dict[str, torch.device] = {}
    for names, tensors in groups:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        choices = [home] if "" in names else list(left)
        chosen = next((device for device in choices if size <= left[device]), None)
        if chosen is None:
            room = ", ".join(f"{device}: {left[device] / 1e6:,.3f} MB" for device in choices)
            what = " with ".join(repr(name) for name in names if name) or "the model's own tensors"
            raise ConfigError(f"placement: {what}: {size / 1e6:,.3f} MB, and there is left {room}")
        left[chosen] -= size
        places |= dict.fromkeys(names, torch.device(chosen))
    return places


def place(model: nn.Module, places: Mapping[str, torch.device]) -> list[RemovableHandle]:
    """Moves each part of the model to its device, and lets the model compute there.

    `places`: what `plan` gave. A part gets its inputs on its own device, and gives its outputs at
    home: so whatever the model does between its parts, it does at home. It costs two copies of the
    activations for each part elsewhere. Returns the hooks that do it. Raises ConfigError, with the
    model as it was, for a part that the model does not have.
    """
    home = places[""]
    names = dict(model.named_modules())
    if missing := [name for name in places if name not in names]:
        raise ConfigError(f"placement: {type(model).__name__} has no part {missing[0]!r}")
    parts = {names[name]: device for name, device in places.items() if name}
    _move_own(model, home, parts)
    hooks = [model.register_forward_pre_hook(partial(_bring, home), with_kwargs=True)]
    for part, device in parts.items():
        part.to(device)
        if device != home:
            hooks.append(part.register_forward_pre_hook(partial(_bring, device), with_kwargs=True))
            hooks.append(part.register_forward_hook(partial(_send, home)))
    return hooks


def _blocks(model: nn.Module, match: str | None) -> set[nn.Module]:
    if match is not None:
        found = {module for name, module in model.named_modules() if re.fullmatch(match, name)}
        if not found:
            raise ConfigError(f"placement: {match!r} fits no module of {type(model).__name__}")
        return found
    kind = repeated_class(model)
    return {module for module in model.modules() if type(module) is kind}


def _parts(module: nn.Module, name: str, blocks: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """What a module is divided into: blocks, and whatever holds none of them."""
    for key, child in module.named_children():
        path = f"{name}.{key}" if name else key
        if child not in blocks and any(inner in blocks for inner in child.modules()):
            yield from _parts(child, path, blocks)
        else:
            yield path, child


def _tied(parts: Mapping[str, list[Tensor]]) -> list[tuple[list[str], list[Tensor]]]:
    """The parts in their order, those that share tensors as one; every tensor once."""
    groups: list[tuple[list[str], dict[int, Tensor]]] = []
    for name, tensors in parts.items():
        names, own = [name], {id(tensor): tensor for tensor in tensors}
        shared = [number for number, group in enumerate(groups) if group[1].keys() & own.keys()]
        for number in reversed(shared):
            others = groups.pop(number)
            names, own = others[0] + names, others[1] | own
        groups.insert(shared[0] if shared else len(groups), (names, own))
    return [(names, list(own.values())) for names, own in groups]


def _move_own(module: nn.Module, home: torch.device, parts: Mapping[nn.Module, Any]) -> None:
    """Moves home what is in no part."""
    for child in module.children():
        if child not in parts:
            _move_own(child, home, parts)
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        tensor.data = tensor.data.to(home)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _bring(device: torch.device, _: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return _moved(args, device), _moved(kwargs, device)


def _send(device: torch.device, _: nn.Module, args: Any, output: Any) -> Any:
    return _moved(output, device)


def _moved(tree: Any, device: torch.device) -> Any:
    """Copies that are done when they are used: a non-blocking one to a CPU would not be."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, tree)
