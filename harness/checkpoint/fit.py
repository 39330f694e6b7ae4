"""What of a checkpoint fits a model that has changed since, entry by entry: `run.resume_changed`.

An entry fits if the model still has it, with this shape: then it keeps its weight, and its
optimizer state if it was trained before and is trained now. Everything else stays as the task has
built it. LoRA's adapters are entries of their own next to the weights of the model, whose names do
not change with them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from harness.engine.engine import Engine
from harness.engine.lora import plain_names
from harness.errors import CheckpointError, first_few
from harness.formats.dtypes import FLOATS
from harness.formats.tensor_file import is_extra_state
from harness.utils import dtype_name
from harness.zero.parameters import full_shape, is_expert
from harness.zero.reader import SavedEngine

_GONE = "not in this run: "
"""Before the names of saved entries that do not fit, so that no entry of the model has them."""


@dataclass
class Fit:
    """What of a saved engine fits a new one."""

    engine: str
    names: dict[str, str] = field(default_factory=dict)
    """What each saved entry is called in the model; what does not fit has a name of nothing."""
    kept: list[str] = field(default_factory=list)
    """Entries that are as they were saved, with their optimizer state if they are trained."""
    stateless: list[str] = field(default_factory=list)
    """Parameters that are as saved, and whose optimizer state begins, as they were not trained."""
    reset: list[str] = field(default_factory=list)
    """Entries that stay as the task has built them, some with the reason."""
    dropped: list[str] = field(default_factory=list)
    """Saved entries that the model does not have."""
    stopped: list[str] = field(default_factory=list)
    """Parameters that were trained, and are frozen now: their optimizer state is dropped."""
    changes: list[str] = field(default_factory=list)
    """What else is another than in the checkpoint."""

    def text(self, most: int | None = None) -> str:
        """All of it on a line each, with at most so many names."""
        lists = {
            "kept": self.kept,
            "kept, and the optimizer's state begins at zero": self.stateless,
            "kept, and frozen now, without the optimizer's state": self.stopped,
            "reset to the task's own values": self.reset,
            "only in the checkpoint, dropped": self.dropped,
        }
        lines = [
            f"{what} ({len(names)}): {first_few(names, most or len(names))}"
            for what, names in lists.items()
            if names
        ]
        return "\n".join(f"engine {self.engine}: {line}" for line in [*lines, *self.changes])

    def check_groups(self, saved: SavedEngine, engine: Engine) -> None:
        """Raises CheckpointError if the state of a parameter cannot follow it to another parameter
        group. `saved`: under the names of the model."""
        for number, names in enumerate(engine.parameter_names):
            for name in (name for name in names if name in saved.shapes):
                if not self._follows(name, saved, engine, number):
                    raise CheckpointError(
                        f"engine {engine.name!r}: {name!r} is in another parameter group than in "
                        f"the checkpoint, to which the state of {engine.optimizer_path} cannot "
                        "follow it: restore the old groups, or start a new run under another "
                        "run.name"
                    )

    def _follows(self, name: str, saved: SavedEngine, engine: Engine, group: int) -> bool:
        """Whether the state of a parameter fits a group: the one that it was in, or where it is
        kept alike."""
        if saved.group_of(name) == group or engine.can_regroup:
            return True
        kind = engine.sharded_optimizer
        settings = saved.groups[saved.group_of(name)], engine.ds.optimizer.param_groups[group]
        return kind is not None and all(
            kind.matrices_in(name, saved.shapes[name], one)
            == kind.matrices_in(name, saved.shapes[name], settings[0])
            for one in settings
        )

    def fit_state(self, state: dict[str, Any], engine: Engine) -> None:
        """Changes what `Engine.state_dict` saved so that the new engine can load it."""
        alpha = engine.state_dict()["lora_alpha"]
        if state.get("lora_alpha", alpha) != alpha:
            self.changes.append(f"lora.alpha is {alpha}, and was {state['lora_alpha']}")
            state["lora_alpha"] = alpha
        if buffers := state.get("buffers"):
            own = {name: tensor.shape for name, tensor in engine.module.named_buffers()}
            values = buffers["values"]
            buffers["values"] = {n: v for n, v in values.items() if own.get(n) == v.shape}
            self.dropped += sorted(values.keys() - buffers["values"].keys() - self.names.keys())


def fit(engine: Engine, saved: SavedEngine) -> Fit:
    """What of a saved engine fits a new one. Raises CheckpointError if that cannot be known."""
    entries = engine.module.state_dict(keep_vars=True)
    if not saved.has_parameter_names or any(map(is_expert, engine.module.parameters())):
        raise CheckpointError(
            f"engine {engine.name!r}: run.resume_changed = 'fit' is not supported for DeepSpeed's "
            "experts, and for checkpoints that do not name the parameters"
        )
    saved_names = plain_names([*saved.weights, *saved.extra])
    by_plain_name = {plain: name for name, plain in saved_names.items()}
    plain = plain_names(entries)
    found = Fit(engine.name, {name: _GONE + name for name in saved_names})
    seen: set[str] = set()
    trained = {name for names in engine.parameter_names for name in names}
    for tied in _tied(entries):
        owner = next((name for name in tied if name in trained), tied[0])
        candidates = [by_plain_name[plain[n]] for n in tied if plain[n] in by_plain_name]
        candidates.sort(key=lambda name: name not in saved.shapes)
        seen |= {*candidates}
        reasons = {name: _mismatch(saved, name, entries[owner]) for name in candidates}
        source = next((name for name, reason in reasons.items() if not reason), None)
        if source is None:
            reason = next(iter(reasons.values()), "")
            found.reset.append(f"{owner} ({reason})" if reason else owner)
            continue
        found.names[source] = owner
        lists = {
            (True, False): found.stateless,
            (False, True): found.stopped,
        }
        is_stepped = owner in trained and full_shape(entries[owner]).numel() > 0
        lists.get((is_stepped, source in saved.shapes), found.kept).append(owner)
    found.dropped += [name for name in saved_names if name not in seen]
    return found


def _tied(entries: Mapping[str, Any]) -> list[list[str]]:
    """The names of each entry: several, if it is tied."""
    names: dict[int, list[str]] = {}
    for name, value in entries.items():
        key = id(value) if isinstance(value, Tensor) and not is_extra_state(name) else id(name)
        names.setdefault(key, []).append(name)
    return list(names.values())


def _mismatch(saved: SavedEngine, name: str, entry: Any) -> str:
    """Why a saved entry does not fit; "" if it does. `entry`: of the model."""
    if is_extra_state(name):
        return ""
    if name in saved.extra:
        return "is not a tensor in the checkpoint"
    weight, shape = saved.weight(name), full_shape(entry)
    if tuple(weight.shape) != tuple(shape):
        return f"{tuple(shape)} in this run, {tuple(weight.shape)} in the checkpoint"
    dtypes = {weight.dtype, dtype_name(entry.dtype)}
    if len(dtypes) > 1 and not dtypes <= set(FLOATS):
        return f"{dtype_name(entry.dtype)} in this run, {weight.dtype} in the checkpoint"
    if isinstance(entry, nn.Parameter) == saved.is_buffer(name):
        return "is a buffer in one, and a parameter in the other"
    return ""
