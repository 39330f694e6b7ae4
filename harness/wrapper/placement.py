"""Places a model's modules on several devices by memory limits, for inference and evaluation.

place(model, plan_placement(model, {"cuda:0": 20e9, "cuda:1": 20e9, "cpu": 200e9}))
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
from harness.wrapper.blocks import repeated_class
from harness.zero.parameters import is_sharded


def plan_placement(
    model: nn.Module, limits: Mapping[str, float], match: str | None = None
) -> dict[str, torch.device]:
    """The device of each piece of a model, by the piece's name. Moves nothing.

    - `limits`: bytes of parameters and buffers that each device may hold, in order of preference;
      leave space for activations. The first device is home: tensors that belong to no piece, such
      as a parameter of the model itself, go there, under the name "".
    - `match`: a regular expression for the full names of blocks, which are never split; by default
      the modules of `repeated_class(model)`.

    Pieces are the blocks, and the siblings of modules that contain blocks. Each goes to the first
    device with enough space; pieces that share a tensor go together. The model may be on "meta".
    Raises ConfigError if a piece fits on no device, `match` matches nothing, or ZeRO has sharded
    the model.
    """
    if not limits:
        raise ConfigError("placement: limits is empty: expected at least one device")
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise ConfigError("placement: the model is already sharded by ZeRO")
    pieces = dict(_pieces(model, "", _blocks(model, match)))
    in_pieces = {id(tensor) for piece in pieces.values() for tensor in _tensors(piece)}
    rest = [tensor for tensor in _tensors(model) if id(tensor) not in in_pieces]
    groups = _tied({"": rest} | {name: _tensors(piece) for name, piece in pieces.items()})
    free = dict(limits)
    home = next(iter(limits))
    places: dict[str, torch.device] = {}
    for names, tensors in groups:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        choices = [home] if "" in names else list(free)
        chosen = next((device for device in choices if size <= free[device]), None)
        if chosen is None:
            space = ", ".join(f"{device}: {free[device] / 1e6:,.3f} MB" for device in choices)
            what = " with ".join(repr(name) for name in names if name) or "the model's own tensors"
            raise ConfigError(
                f"placement: no device has space for {what} ({size / 1e6:,.3f} MB); free: {space}"
            )
        free[chosen] -= size
        places |= dict.fromkeys(names, torch.device(chosen))
    return places


def place(model: nn.Module, places: Mapping[str, torch.device]) -> list[RemovableHandle]:
    """Moves each piece of the model to its device, and adds hooks so that it computes there.

    `places`: the result of `plan_placement`. A piece gets its inputs on its own device and returns
    its outputs at home, so everything between pieces runs at home. Each piece on another device
    costs two copies of the activations. Returns the hooks. Raises ConfigError, with the model
    unchanged, for a piece that the model does not have.
    """
    home = places[""]
    modules = dict(model.named_modules())
    if missing := [name for name in places if name not in modules]:
        raise ConfigError(f"placement: {type(model).__name__} has no module {missing[0]!r}")
    pieces = {modules[name]: device for name, device in places.items() if name}
    _move_rest(model, home, pieces)
    hooks = [model.register_forward_pre_hook(partial(_inputs_to, home), with_kwargs=True)]
    for piece, device in pieces.items():
        piece.to(device)
        if device != home:
            to_device = partial(_inputs_to, device)
            hooks.append(piece.register_forward_pre_hook(to_device, with_kwargs=True))
            hooks.append(piece.register_forward_hook(partial(_output_to, home)))
    return hooks


def _blocks(model: nn.Module, match: str | None) -> set[nn.Module]:
    if match is not None:
        blocks = {module for name, module in model.named_modules() if re.fullmatch(match, name)}
        if not blocks:
            raise ConfigError(f"placement: {match!r} matches no module of {type(model).__name__}")
        return blocks
    repeated = repeated_class(model)
    return {module for module in model.modules() if type(module) is repeated}


def _pieces(
    module: nn.Module, name: str, blocks: set[nn.Module]
) -> Iterator[tuple[str, nn.Module]]:
    """The pieces of a module: blocks, and modules that contain no block."""
    for key, child in module.named_children():
        path = f"{name}.{key}" if name else key
        if child not in blocks and any(inner in blocks for inner in child.modules()):
            yield from _pieces(child, path, blocks)
        else:
            yield path, child


def _tied(pieces: Mapping[str, list[Tensor]]) -> list[tuple[list[str], list[Tensor]]]:
    """The pieces in order, with those that share tensors merged; each tensor once."""
    groups: list[tuple[list[str], dict[int, Tensor]]] = []
    for name, tensors in pieces.items():
        names, own = [name], {id(tensor): tensor for tensor in tensors}
        shared = [number for number, group in enumerate(groups) if group[1].keys() & own.keys()]
        for number in reversed(shared):
            others = groups.pop(number)
            names, own = others[0] + names, others[1] | own
        groups.insert(shared[0] if shared else len(groups), (names, own))
    return [(names, list(own.values())) for names, own in groups]


def _move_rest(module: nn.Module, home: torch.device, pieces: Mapping[nn.Module, Any]) -> None:
    """Moves tensors that are in no piece to `home`."""
    for child in module.children():
        if child not in pieces:
            _move_rest(child, home, pieces)
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        tensor.data = tensor.data.to(home)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _inputs_to(device: torch.device, _: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return _moved(args, device), _moved(kwargs, device)


def _output_to(device: torch.device, _: nn.Module, args: Any, output: Any) -> Any:
    return _moved(output, device)


def _moved(tree: Any, device: torch.device) -> Any:
    """Copies with blocking: a non-blocking copy to a CPU may be read before it is complete."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, tree)
