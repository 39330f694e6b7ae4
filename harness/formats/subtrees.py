"""Which part of the structure in a `.pt` holds the weights: `{"model": {...}, "epoch": 3}`.

A part is named by its keys, joined with dots: "model", "state.module".
"""

from collections.abc import Callable, Iterator
from typing import Any

from harness.errors import FormatError, did_you_mean, first_few

Tree = dict[str, Any]


def weights_in(tree: Any, is_weights: Callable[[Any], bool]) -> dict[str, Tree]:
    """The dicts of tensors in a structure by key, without the optimizer's."""
    if not isinstance(tree, dict):
        return {}
    found: dict[str, Tree] = {}
    for keys, part in _walk(tree, is_weights):
        if not keys[0].startswith("optim"):
            found[".".join(keys)] = part
    return found


def choose(tree: Any, key: str | None, is_weights: Callable[[Any], bool]) -> tuple[str, Tree]:
    """The key and content of the part that `key` names; with None, of the only one.

    Raises FormatError, with the keys that can be chosen, if there is no such part.
    """
    parts = weights_in(tree, is_weights)
    if key is None:
        if len(parts) == 1:
            return next(iter(parts.items()))
        raise FormatError(f"not a dict of tensors: {_offer(parts)}")
    if key not in parts:
        raise FormatError(f"--key {key!r}{did_you_mean(key, parts)}: {_offer(parts)}")
    return key, parts[key]


def beside(tree: Tree, key: str) -> list[str]:
    """The keys of all that is not in the part that `key` names."""
    found: list[str] = []
    for other, value in tree.items():
        if isinstance(value, dict) and key.startswith(f"{other}."):
            inner = beside(value, key.removeprefix(f"{other}."))
            found += [f"{other}.{name}" for name in inner]
        elif other != key:
            found.append(str(other))
    return found


def _offer(parts: dict[str, Tree]) -> str:
    if not parts:
        return "no key of it holds a dict of tensors"
    listed = first_few([f"--key {key!r} ({len(part)} entries)" for key, part in parts.items()])
    return f"choose one of {listed}"


def _walk(
    tree: Tree, is_weights: Callable[[Any], bool], keys: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Tree]]:
    for key, value in tree.items():
        if isinstance(key, str) and isinstance(value, dict):
            if is_weights(value):
                yield (*keys, key), value
            else:
                yield from _walk(value, is_weights, (*keys, key))
