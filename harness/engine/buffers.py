"""Buffers that training changes: running statistics, codebooks, counters.

No gradient keeps them alike on the ranks. There are two ways, `engines.NAME.buffers`:

- "sync", as torch's DDP: before a step every rank takes rank 0's. It also does before anything
  reads them between two steps: a save, an evaluation, an export. As only steps change them, that
  makes no difference to the steps that follow.
- "own": every rank keeps its own, and a checkpoint has those of every rank.

Which ones training changes is found by comparing them with what they were: `Tensor._version` knows
neither of BatchNorm's updates nor of those through `.data`. That is done after the steps 1, 2, 4,
8, ..., at every multiple of 256, and before anything reads them. All ranks agree on the result, and
checkpoints have it, so that a resumed run broadcasts the same ones. A buffer that changes its
shape, as a cache does, or is sparse, stays each rank's own.
"""

import logging
import math
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from harness import distributed
from harness.distributed.tensors import broadcast_tensors
from harness.errors import CheckpointError, TaskError, counted, first_few
from harness.utils import dtype_name

log = logging.getLogger(__name__)
log_warning = distributed.global_leader_only(log.warning)

Mode = Literal["sync", "own"]

SEARCH_EVERY = 256  # steps
MOST_COPIED = 64 << 20
"""Bytes of an engine's buffers that training has not changed yet, and that are copied before a step
none the less: it may be the first to change them, and be skipped."""


class Layout(NamedTuple):
    """What buffers must have in common for one to overwrite the other."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Content(NamedTuple):
    """A buffer as it was at some time."""

    layout: Layout
    crc: int | None
    """CRC-32 of its bytes; None of several ranks whose differ."""


_Found = tuple[dict[str, Content], set[str]]


class Slot(NamedTuple):
    """Where a module has a buffer: its tensor may be replaced."""

    owner: nn.Module
    key: str
    layout: Layout


class Buffers:
    """The buffers of one engine, and which of them training changes."""

    def __init__(self, engine: str, module: nn.Module, mode: Mode | None):
        """`mode`: None for "sync", or in a resumed run that of its checkpoint."""
        self.mode: Mode = mode or "sync"
        self._engine = engine
        self._module = module
        self._is_mode_chosen = mode is not None
        self._changed: dict[str, Slot] = {}  # alike on every rank
        self._restored: Sequence[str] = ()  # that the checkpoint names as changed
        self._others: dict[str, Content] | None = None  # at the last search
        self._small: dict[str, Slot] = {}  # others that take `MOST_COPIED` together
        self._is_stepped = False  # since the first search
        self._is_compared = False  # whether it is known which ones training changes
        self._searched_at = 0  # step of the last search

    @property
    def changed(self) -> list[str]:
        """Names of those that training changes, the same on every rank."""
        return list(self._changed)

    @property
    def has_searched(self) -> bool:
        """Whether it has searched at least once since the start or the resume."""
        return self._others is not None

    def search(self, step: int) -> None:
        """Looks for buffers that have changed on any rank since the last call. Collective.

        `step`: the last one taken. The first call remembers what they are, and in mode "sync" makes
        them alike.
        """
        found = {n: content_of(t) for n, t in self._tensors() if n not in self._changed}
        is_first = self._others is None
        self._is_compared |= self._is_stepped
        changed = set(self._restored) if is_first else self._changed_since(found)
        alike, changed = distributed.all_reduce((found, changed), _of_both)
        new = sorted(alike.keys() & changed)
        self._changed |= {name: self._slot(name, alike[name].layout) for name in new}
        self._others = {name: content for name, content in found.items() if name not in new}
        self._small = {n: self._slot(n, self._others[n].layout) for n in self._smallest()}
        if new:
            whose = "rank 0's before every step" if self.mode == "sync" else "each rank's own"
            log.info("engine %s: training changes %s: %s", self._engine, summary(new), whose)
            unnoticed = step - self._searched_at
            if self.mode == "sync" and not is_first and unnoticed > 1:
                log_warning(
                    "engine %s: %s: began to change in one of the last %d steps, and may have been "
                    "each rank's own in the steps after it",
                    *(self._engine, summary(new), unnoticed),
                )
        self._searched_at = step
        if is_first and self.mode == "sync":
            others = sorted(alike.keys() - set(new))
            self._make_alike([name for name in others if alike[name].crc is None])

    def _slot(self, name: str, layout: Layout) -> Slot:
        path, _, key = name.rpartition(".")
        return Slot(self._module.get_submodule(path), key, layout)

    def _smallest(self) -> Iterator[str]:
        """Names of the buffers that are not known to change, up to `MOST_COPIED`."""
        others = {name: c.layout for name, c in (self._others or {}).items()}
        sizes = {n: math.prod(shape) * dtype.itemsize for n, (shape, dtype) in others.items()}
        total = 0
        for name in sorted(sizes, key=sizes.__getitem__):
            if (total := total + sizes[name]) > MOST_COPIED:
                return
            yield name

    def _changed_since(self, found: dict[str, Content]) -> set[str]:
        """Names of the buffers whose content, but not their layout, is another than before."""
        before = self._others or {}
        return {
            name
            for name, content in found.items()
            if name in before
            and before[name].layout == content.layout
            and before[name].crc != content.crc
        }

    def _make_alike(self, names: Sequence[str]) -> None:
        """Overwrites buffers that the ranks were built with by rank 0's. Collective."""
        if not names:
            return
        assert self._others is not None
        log_warning(
            "engine %s: the ranks were built with different buffers, and take rank 0's: %s",
            self._engine,
            summary(names),
        )
        tensors = dict(self._tensors())
        broadcast_tensors([tensors[name] for name in names])
        self._others |= {name: content_of(tensors[name]) for name in names}

    def synced(self) -> list[Tensor]:
        """What a step broadcasts: in mode "sync" the buffers that training changes.

        Raises TaskError if one has another shape or dtype than when it was found.
        """
        if self.mode == "own":
            return []
        tensors = []
        for name, (owner, key, layout) in self._changed.items():
            tensor = owner._buffers.get(key)
            if tensor is None or tensor.shape != layout.shape or tensor.dtype != layout.dtype:
                found = "no tensor" if tensor is None else _text(layout_of(tensor))
                raise TaskError(
                    f"engine {self._engine!r}: buffer {name!r} is broadcast before every step, and "
                    f"was {_text(layout)}; now it is {found}: set engines.{self._engine}.buffers = "
                    "'own' to let every rank keep its own buffers"
                )
            tensors.append(tensor)
        return tensors

    def changeable(self) -> dict[str, tuple[nn.Module, str, Tensor]]:
        """The buffers that a step may change, with the modules that have them: those that training
        changes, and the smallest others; all until they are known. Called before a step."""
        self._is_stepped = True
        if self._is_compared:
            slots = self._changed | self._small
        else:
            slots = {name: self._slot(name, layout_of(tensor)) for name, tensor in self._tensors()}
        found = ((n, owner, key, owner._buffers.get(key)) for n, (owner, key, _) in slots.items())
        return {n: (owner, key, tensor) for n, owner, key, tensor in found if tensor is not None}

    def restored(self) -> None:
        """The step was undone, and so shows nothing."""
        self._is_stepped = False

    def log_own(self, what: str) -> None:
        """Logs that `what` was done with buffers that differ by rank, if there are such."""
        if self.mode == "own" and self._changed and distributed.world_size() > 1:
            log.info("engine %s: %s: %s", self._engine, what, summary(self.changed))

    def state_dict(self) -> dict[str, Any]:
        """What DeepSpeed's checkpoint lacks of the buffers that training changes, as of the last
        search: in mode "sync" those that are not persistent, in mode "own" all of this rank."""
        persistent = self._module.state_dict(keep_vars=True) if self.mode == "sync" else {}
        values = {
            name: tensor.detach()
            for name, tensor in self._tensors()
            if name in self._changed and name not in persistent
        }
        ranks = distributed.world_size()
        return {"mode": self.mode, "changed": self.changed, "values": values, "ranks": ranks}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Restores what `state_dict` returned. Call it after DeepSpeed's own loading.

        None from an older version, where every rank kept its own, and the checkpoint had rank 0's:
        mode "own", unless the config sets one.
        """
        if not self._is_mode_chosen:
            self.mode = state["mode"] if state is not None else "own"
        if state is None:
            if self.mode == "own" and any(True for _ in self._tensors()):
                log.info(
                    "engine %s: the checkpoint is of an older version: every rank starts with rank "
                    "0's buffers, and keeps its own, as before; engines.%s.buffers = 'sync' "
                    "changes that",
                    self._engine,
                    self._engine,
                )
            return
        self._restored = state["changed"]
        self._is_compared = True
        tensors = dict(self._tensors())
        for name, value in state["values"].items():
            if name in tensors and tensors[name].shape == value.shape:
                tensors[name].copy_(value)
            else:  # one that the model registers later
                self._register(name, value)
        if self.mode == "own" and state["ranks"] != distributed.world_size():
            log.info(
                "engine %s: saved on %s: every rank starts with rank 0's buffers",
                self._engine,
                counted(state["ranks"], "rank"),
            )

    def _register(self, name: str, value: Tensor) -> None:
        """Adds a buffer that is not persistent. Raises CheckpointError if its module is missing."""
        path, _, key = name.rpartition(".")
        try:
            owner = self._module.get_submodule(path)
        except AttributeError as error:
            raise CheckpointError(
                f"engine {self._engine!r}: the checkpoint has a buffer {name!r}, and the model has "
                f"no module {path!r}: {error}"
            ) from None
        owner.register_buffer(key, value.to(distributed.device()), persistent=False)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All dense buffers by name; a tied one has one name."""
        for name, tensor in self._module.named_buffers():
            if not is_lazy(tensor) and tensor.layout == torch.strided:
                yield name, tensor


def sync(buffers: Sequence[Buffers], step: int, search: bool) -> None:
    """Makes the buffers that training changes rank 0's on every rank, in one broadcast, where the
    mode is "sync". `step`: the last one taken. `search`: whatever the step. Collective."""
    is_due = search or step & (step - 1) == 0 or step % SEARCH_EVERY == 0
    for one in buffers:
        if is_due or not one.has_searched:
            one.search(step)
    if distributed.world_size() == 1:
        return
    if tensors := [tensor for one in buffers for tensor in one.synced()]:
        broadcast_tensors(tensors)


def layout_of(tensor: Tensor) -> Layout:
    """Shape and dtype."""
    return Layout(tuple(tensor.shape), tensor.dtype)


def content_of(tensor: Tensor) -> Content:
    """Layout and checksum. Waits for the device."""
    data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return Content(layout_of(tensor), zlib.crc32(data.data))


def summary(names: Sequence[str]) -> str:
    """How many there are, and the first names."""
    noun = "buffer" if len(names) == 1 else "buffers"
    return f"{len(names)} {noun} ({first_few(names)})"


def _of_both(some: _Found, more: _Found) -> _Found:
    """The buffers that all ranks have in the same layout, and those that have changed on any."""
    (contents, changed), (others, too) = some, more
    alike = {
        name: content if content == others[name] else Content(content.layout, None)
        for name, content in contents.items()
        if name in others and content.layout == others[name].layout
    }
    return alike, changed | too


def _text(layout: Layout) -> str:
    return f"{dtype_name(layout.dtype)} {list(layout.shape)}"
