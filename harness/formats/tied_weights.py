"""Tied tensors in a safetensors file: stored once, with all names in the metadata.

The structure that `harness.io` writes for a dict of tensors, some under several names.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from harness.errors import counted
from harness.formats import json_tree


def note(names: int) -> str:
    """What follows a count of tensors of which some have more `names`; empty without any."""
    return f" (and {counted(names, 'tied name')})" if names else ""


def to_metadata(names: Iterable[str], aliases: Mapping[str, str]) -> dict[str, str]:
    """The metadata for tensors of these names, with `aliases` of some; empty without aliases."""
    node = json_tree.flat_dict(names)
    node["dict"] |= {alias: {"tensor": name} for alias, name in aliases.items()}
    return json_tree.to_metadata(node, names)


def stored_names(metadata: Mapping[str, Any], tensors: Iterable[str]) -> dict[str, str] | None:
    """Maps every tensor name in a file to the name that the tensor is stored under.

    None if the file contains another structure than a dict, or a module's state dict, of complete
    tensors. Raises FormatError if the metadata is damaged.
    """
    match json_tree.from_metadata(metadata, tensors):
        case {"dict": dict(nodes), **rest} if not rest:
            pairs = list(nodes.items())
        case {"OrderedDict": list(pairs), **rest} if rest.keys() <= {"_metadata"}:
            pass
        case _:
            return None
    names: dict[str, str] = {}
    for pair in pairs:
        match pair:
            case (str(name), {"tensor": str(stored), **rest}) if not rest and name not in names:
                names[name] = stored
            case _:
                return None
    return names if set(names.values()) == set(tensors) else None
