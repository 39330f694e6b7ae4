"""Other names for the entries of a model in DeepSpeed's trees."""

from collections.abc import Mapping
from typing import Any

from harness.zero.layout import PARAMETER_NAMES, Tree

_BY_NAME = ("module", "frozen_param_shapes", "frozen_param_fragments")
"""Keys of model_states with a dict by the names of entries."""


def renamed(model: Tree, names: Mapping[str, str]) -> Tree:
    """A tree of model_states in which the entries in `names` have other names; its order stays."""

    def keys(table: Any) -> Any:
        return None if table is None else {names.get(k, k): value for k, value in table.items()}

    changed: Tree = {key: keys(model[key]) for key in _BY_NAME if key in model}
    if (shapes := model.get("param_shapes")) is not None:
        changed["param_shapes"] = keys(shapes) if isinstance(shapes, dict) else [*map(keys, shapes)]
    if model.get("shared_params"):
        shared = keys(model["shared_params"])
        changed["shared_params"] = {k: names.get(name, name) for k, name in shared.items()}
    if "buffer_names" in model:
        changed["buffer_names"] = [names.get(name, name) for name in model["buffer_names"]]
    if PARAMETER_NAMES in model:
        changed[PARAMETER_NAMES] = [
            [names.get(name, name) for name in group] for group in model[PARAMETER_NAMES]
        ]
    return model | changed
