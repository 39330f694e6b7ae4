"""Renamed config keys, and moved modules that configs and manifests name.

The old names still work; help, messages and new files use the new ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RenamedKey:
    """A config key that was renamed, possibly along with its values."""

    section: str
    """Its section; `*` matches any name."""
    old: str
    new: str
    values: Mapping[str, str] = field(default_factory=dict)
    """Old values and their new names."""


RENAMED_KEYS = (
    RenamedKey("engines.*", "every", "train_every"),
    RenamedKey("trainer", "save_on_quit", "save_at_end"),
    RenamedKey("trainer", "export_on_quit", "export_at_end"),
    RenamedKey("checkpoint", "best", "best_mode", {"lowest": "min", "highest": "max"}),
    RenamedKey("optimizations.offload", "budget", "fraction"),
    RenamedKey("optimizations.offload", "host_budget", "host_bytes"),
)

MOVED_MODULES = {
    "harness.adapters.ao": "harness.wrapper.layers.torchao",
    "harness.adapters.bnb": "harness.wrapper.layers.bitsandbytes",
    "harness.adapters.te": "harness.wrapper.layers.transformer_engine",
    "harness.bitnet": "harness.wrapper.layers.bitnet",
    "harness.optim.apollo": "harness.optim.apollo.optimizer",
}
"""New paths of modules that configs and manifests name."""


def current_keys(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables, like those of a config file, with all keys under their current names.

    Raises ValueError if a key is set under both its old and its new name.
    """
    current: Any = dict(tables)
    for key in RENAMED_KEYS:
        current = _renamed(current, key.section.split("."), key)
    return current


def _renamed(table: Any, section: Sequence[str], key: RenamedKey) -> Any:
    if not isinstance(table, Mapping):  # validation reports it
        return table
    if section:
        return {
            name: _renamed(value, section[1:], key) if section[0] in ("*", name) else value
            for name, value in table.items()
        }
    if {key.old, key.new} <= table.keys():
        raise ValueError(
            f"{key.section}: {key.old!r} was renamed to {key.new!r}, and both are set: "
            f"remove {key.old!r}"
        )
    return dict(_renamed_item(name, value, key) for name, value in table.items())


def _renamed_item(name: str, value: Any, key: RenamedKey) -> tuple[str, Any]:
    if name != key.old:
        return name, value
    return key.new, key.values.get(value, value) if isinstance(value, str) else value


def current_setting(key: str, text: str) -> tuple[str, str]:
    """The current names of a dotted key and its value (text, quoted or not)."""
    for renamed in RENAMED_KEYS:
        if key == f"{renamed.section}.{renamed.old}":
            word = text.strip("\"'")
            new = renamed.values.get(word)
            return f"{renamed.section}.{renamed.new}", text.replace(word, new) if new else text
    return key, text


def current_import_path(path: str) -> str:
    """An import path `module:name` with the module's current path."""
    module, colon, name = path.partition(":")
    return f"{MOVED_MODULES.get(module, module)}{colon}{name}"
