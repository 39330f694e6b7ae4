"""Weights that the task changes in place, at every ZeRO stage.

With ZeRO or in 16 bits an optimizer steps fp32 masters, and writes the model's weights from them:
what was changed in the weights alone is undone by the next step. Here both are changed.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

from torch import nn

from harness import distributed
from harness.errors import first_few
from harness.utils import is_compiled
from harness.zero import engine_state, fetches
from harness.zero.file_trees import FileTrees
from harness.zero.writes import Writes

log = logging.getLogger(__name__)


class Edits:
    """Changes the weights of one engine, and notices when they are changed in another way."""

    def __init__(self, name: str, ds: Any, collect: Callable[[], FileTrees]):
        """`ds`: the DeepSpeed engine. `collect`: its trees, as `Engine.collect`."""
        self.count = 0
        """Of the edits so far."""
        self._name = name
        self._ds = ds
        self._collect = collect
        self._watched = engine_state.watchable(ds)
        self._versions: list[int] = []
        self._writes: Writes | None = None
        self._is_first = bool(self._watched)  # of the micro-batches
        self._steps = 0

    @cached_property
    def _shapes(self) -> Any:
        return engine_state.shapes_of(self._collect())

    @contextmanager
    def block(self) -> Iterator[nn.Module]:
        """The model with complete parameters, to be changed in place: `Engine.edit_weights`.

        What was changed before an exception stays changed, at every stage.
        """
        self.count += 1
        masters = engine_state.has_masters(self._ds)
        shapes = self._shapes if masters else []
        self.check()
        doing = f"engine {self._name!r}: edit_weights"
        with fetches.as_sharded(self._ds):
            try:
                with (
                    engine_state.editing(self._ds.module),
                    distributed.raise_on_all_ranks(doing),
                    self._writes.allowed() if self._writes else nullcontext(),
                ):
                    yield self._ds.module
            finally:
                if masters:
                    engine_state.update_masters(self._ds, shapes)
                self._versions = self._current()

    def stepped(self) -> None:
        """Checks after steps 1, 2, 4, 8, ...: reading the versions of 3,000 parameters takes 1 ms,
        too long for every step."""
        self._steps += 1
        if self._steps & (self._steps - 1) == 0:
            self.check()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """To be open in the forward of a micro-batch: the first one warns of weights that it has
        changed through their `data`. Not if a part of the model is compiled."""
        is_first, self._is_first = self._is_first, False
        if not is_first or is_compiled(self._ds.module):
            yield
            return
        with Writes(self._watched) as self._writes:
            yield
        self._warn(sorted(self._writes.changed))

    def check(self) -> None:
        """Warns if weights were changed in place since the last check, as torch counts. DeepSpeed's
        own writes do not count."""
        versions = self._current()
        if self._versions:
            pairs = zip(self._watched, versions, self._versions, strict=True)
            self._warn([name for name, new, old in pairs if new != old])
        self._versions = versions

    def _warn(self, names: list[str]) -> None:
        if names:
            log.warning(
                "engine %s: changed in place outside of engine.edit_weights(): %s: the next step "
                "undoes this, as it writes the weights from their fp32 masters, and at ZeRO 3 the "
                "weights are empty between their uses. Use `with engine.edit_weights() as model: "
                "...`",
                self._name,
                first_few(names),
            )

    def forget(self) -> None:
        """The weights have been loaded."""
        self._versions = []

    def _current(self) -> list[int]:
        return [parameter._version for parameter in self._watched.values()]
