"""Tied tensors in a safetensors file: stored once, and the further names told in the metadata.

The simplest of the structures that `harness.io` writes: a dict of tensors, some named twice.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from harness.formats import json_tree


def described(names: Iterable[str], aliases: Mapping[str, str]) -> dict[str, str]:
    """The metadata for tensors of these names, and `aliases` of some; none if there are none."""
    node = json_tree.flat(names)
    node["dict"] |= {alias: {"tensor": kept} for alias, kept in aliases.items()}
    return json_tree.to_metadata(node, names)


def names(metadata: Mapping[str, Any], tensors: Iterable[str]) -> dict[str, str] | None:
    """Every name of a file's tensors, and the one that it is stored under.

    None if the file holds another structure than a dict, or a module's state dict, of whole
    tensors. Raises FormatError if the metadata are damaged.
    """
    match json_tree.from_metadata(metadata, tensors):
        case {"dict": dict(nodes), **rest} if not rest:
            pairs = list(nodes.items())
        case {"OrderedDict": list(pairs), **rest} if rest.keys() <= {"_metadata"}:
            pass
        case _:
            return None
    found: dict[str, str] = {}
    for pair in pairs:
        match pair:
            case (str(name), {"tensor": str(kept), **rest}) if not rest and name not in found:
                found[name] = kept
            case _:
                return None
    return found if set(found.values()) == set(tensors) else None
