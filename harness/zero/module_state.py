"""A model's state dict, loaded in a time that grows as the number of its entries.

torch's `Module.load_state_dict` (2.13) looks at all entries of a module once for each of its
children: half a minute for the 30,000 parameters of 15,000 layers in one Sequential. A torch that
is newer than we know loads by itself.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys


@contextmanager
def loading(model: nn.Module) -> Iterator[None]:
    """In the block the model's `load_state_dict` is `load`, unless it has one of its own."""
    is_plain = type(model).load_state_dict is nn.Module.load_state_dict
    if torch.__version__ >= "2.14" or not is_plain or "load_state_dict" in vars(model):
        yield
        return
    vars(model)["load_state_dict"] = lambda state, strict=True: load(model, state, strict)
    try:
        yield
    finally:
        del vars(model)["load_state_dict"]


def load(model: nn.Module, state_dict: Mapping[str, Any], strict: bool = True) -> Any:
    """`nn.Module.load_state_dict`, with all hooks of the modules, and the same errors."""
    metadata = getattr(state_dict, "_metadata", {})
    entries: Any = OrderedDict(state_dict)  # which a module's own loading may change
    entries._metadata = metadata
    keys = _IncompatibleKeys([], [])
    errors: list[str] = []
    _load(model, entries, "", metadata, keys, errors)
    if strict:
        for what, names in (("Unexpected", keys.unexpected_keys), ("Missing", keys.missing_keys)):
            if names:
                listed = ", ".join(f'"{name}"' for name in names)
                errors.insert(0, f"{what} key(s) in state_dict: {listed}. ")
    if errors:
        kind, text = type(model).__name__, "\n\t".join(errors)
        raise RuntimeError(f"Error(s) in loading state_dict for {kind}:\n\t{text}")
    return keys


def _load(
    module: nn.Module,
    entries: Mapping[str, Any],
    prefix: str,
    metadata: Mapping[str, Any],
    keys: Any,
    errors: list[str],
) -> None:
    module._load_from_state_dict(
        entries,
        prefix,
        metadata.get(prefix[:-1], {}),
        True,
        keys.missing_keys,
        keys.unexpected_keys,
        errors,
    )
    by_child: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in entries.items() if module._modules else ():
        child, dot, _ = key[len(prefix) :].partition(".")
        if dot and key.startswith(prefix):
            by_child[child][key] = value
    for name, child in module._modules.items():
        if child is not None:
            _load(child, by_child[name], f"{prefix}{name}.", metadata, keys, errors)
    for hook in module._load_state_dict_post_hooks.values():
        if hook(module, keys) is not None:
            raise AssertionError("a load_state_dict_post_hook changes the keys in place only")
