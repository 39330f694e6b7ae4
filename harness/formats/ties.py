"""Tied tensors in a safetensors file: stored once, and the further names told in the metadata.

The simplest of the structures that `harness.io` writes: a dict of tensors, some named twice.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from harness.formats import tree

KEY = "harness"
"""The key of the metadata under which a structure stands."""
VERSION = 1


def described(names: Iterable[str], aliases: Mapping[str, str]) -> dict[str, str]:
    """The metadata for tensors of these names, and `aliases` of some; none if there are none."""
    if not aliases:
        return {}
    tensors = {name: name for name in names} | dict(aliases)
    node = {"dict": {name: {"tensor": kept} for name, kept in tensors.items()}}
    return {KEY: tree.dumps({"version": VERSION, "tree": node})}


def names(metadata: Mapping[str, Any], tensors: Iterable[str]) -> dict[str, str] | None:
    """Every name of a file's tensors, and the one that it is stored under.

    None if the file holds another structure than a dict of whole tensors. Raises FormatError if
    the metadata are damaged.
    """
    if KEY not in metadata:
        return {name: name for name in tensors}
    match tree.loads(str(metadata[KEY])):
        case {"version": 1, "tree": {"dict": dict(nodes), **rest}} if not rest:
            found = {name: _plain(node) for name, node in nodes.items()}
            kept = {name for name in found.values() if name is not None}
            if None not in found.values() and kept == set(tensors):
                return {name: stored for name, stored in found.items() if stored is not None}
    return None


def _plain(node: Any) -> str | None:
    match node:
        case {"tensor": str(name), **rest} if not rest:
            return name
    return None
