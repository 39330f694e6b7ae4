"""Offloading for a model that knows nothing of it: its repeated blocks become regions.

A block's class is replaced by a subclass of it with another `__call__`. So the block stays what it
was for `isinstance`, `state_dict` and its hooks, and what hooks do, like ZeRO's gathering, is done
again when it is recomputed. Copies and pickles of a block are plain.
"""

import functools
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from harness.errors import ConfigError
from harness.offload.planner import Budget, Planner
from harness.offload.regions import Inputs, call_saving, tensor_bytes
from harness.offload.saved import Store
from harness.offload.stats import Stats
from harness.offload.streams import Backend, default_backend

log = logging.getLogger(__name__)

MIN_BYTES = 2 << 20
"""Smaller tensors are not worth a copy."""

Match = type[nn.Module] | str | Callable[[str, nn.Module], bool]
Mode = Literal["inputs", "saved"]

_BLOCK = "_harness_offload_block"


class OffloadPlan:
    """Which blocks of a model are offloaded, and how. `attach` makes it."""

    def __init__(
        self,
        modules: dict[str, nn.Module],
        mode: Mode,
        store: Store,
        budget: Budget,
        keep_last: int,
        micro_batches: int,
    ):
        self.modules = modules
        """The blocks by name, in the model's order."""
        self.mode: Mode = mode
        self.store = store
        device = next((p.device for m in modules.values() for p in m.parameters()), None)
        self.planner = Planner(
            budget,
            lambda: (
                store.pool.peak,
                store.backend.headroom(device or torch.device(store.backend.device_type)),
                store.backend.stall_s(),
            ),
            micro_batches,
        )
        self._kept = 0
        self._told = Stats()
        for place, module in enumerate(modules.values()):
            is_last = place >= len(modules) - keep_last
            module.__dict__[_BLOCK] = _Block(self, place, is_last)
            module.__class__ = _offloaded(type(module))

    def detach(self) -> None:
        """Makes the blocks what they were. Graphs that exist stay valid. Idempotent."""
        for module in self.modules.values():
            block = module.__dict__.get(_BLOCK)
            if block is not None and block.plan is self:
                del module.__dict__[_BLOCK]
                module.__class__ = type(module).__bases__[1]
        self.store.drain()

    def drain(self) -> None:
        """After an exception: waits for the copies, and frees host memory that nothing needs."""
        self.store.drain()

    def stats(self) -> Stats:
        """What was done so far."""
        found = self.store.stats()
        return replace(found, kept=found.kept + self._kept)

    def figures(self) -> dict[str, float]:
        """What was done since the last call, as `offload/...`."""
        stats = self.stats()
        since, self._told = stats.since(self._told), stats
        return {f"offload/{name}": float(value) for name, value in asdict(since).items()}

    def run(
        self, place: int, is_last: bool, function: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Makes a block's call."""
        inputs = Inputs(function, args, kwargs) if self.mode == "inputs" else None
        size = tensor_bytes(tree_leaves((args, kwargs)) if inputs is None else inputs.tensors)
        wanted = self.planner.wants(place, size, self.store.unpacked) and not is_last
        if not wanted and size >= self.store.min_bytes:
            self._kept += 1
        if inputs is not None:
            return inputs.call(self.store if wanted else None)
        if wanted:
            return call_saving(self.store, function, args, kwargs)
        return function(*args, **kwargs)


class _Block:
    """What the plan has to say of one module."""

    def __init__(self, plan: OffloadPlan, place: int, is_last: bool):
        self.plan, self.place, self.is_last = plan, place, is_last


class _Offloaded(nn.Module):
    """Comes before a module's own class."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Hides the hook of the module's class, which is not being subclassed by its user."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced: Any = super().__reduce_ex__(protocol)
        _, _, state, *rest = reduced
        state = {key: value for key, value in state.items() if key != _BLOCK}
        return object.__new__, (type(self).__bases__[1],), state, *rest


@functools.cache
def _offloaded(plain: type[nn.Module]) -> type[nn.Module]:
    """The subclass for modules of a class; no different in eval mode, or without gradients."""

    @torch.compiler.disable  # a compiled block is called from here, and stays compiled
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        function = functools.partial(plain.__call__, self)
        if not (self.training and torch.is_grad_enabled()):
            return function(*args, **kwargs)
        block: _Block = self.__dict__[_BLOCK]
        return block.plan.run(block.place, block.is_last, function, args, kwargs)

    names = {key: getattr(plain, key) for key in ("__module__", "__qualname__", "__doc__")}
    return type(plain.__name__, (_Offloaded, plain), names | {"__call__": call})


def attach(
    model: nn.Module,
    match: Match | None = None,
    *,
    mode: Mode = "inputs",
    budget: Budget = "auto",
    keep_last: int = 1,
    min_bytes: int = MIN_BYTES,
    host_budget: int | None = None,
    micro_batches: int = 1,
    backend: Backend | None = None,
) -> OffloadPlan:
    """Offloads the activations of a model's blocks while it trains. Returns what can undo it.

    - `match` says which modules are blocks: a class, a regular expression for their whole names, or
      a function of name and module; by default those of the class that `repeated_class` finds.
    - `mode`: "inputs" sends a block's inputs to host memory and recomputes the rest in backward;
      "saved" sends all that it saves and recomputes nothing, which moves many times the bytes.
    - `budget`: "all", a part of the blocks from 0 to 1, or "auto": as much as the device's memory
      makes necessary.
    - `keep_last`: so many blocks at the end are not offloaded, as backward wants them at once (in
      mode "inputs" they are recomputed all the same).
    - `min_bytes`: smaller tensors stay.
    - `host_budget`: bytes of pinned host memory at most; by default half of what is available,
      divided by the ranks of this machine. What has no room there stays on the device.
    - `micro_batches`: those of an optimizer step (gradient accumulation). "auto" decides after the
      first step, in which the optimizer makes its state.

    Losses, gradients and random generators are those of the plain model, to the bit. Raises
    ConfigError if nothing matches, a block is offloaded already, or a setting is impossible.
    """
    if mode not in ("inputs", "saved"):
        raise ConfigError(f'offload: mode = {mode!r}, expected "inputs" or "saved"')
    for name, value, least in (
        ("keep_last", keep_last, 0),
        ("min_bytes", min_bytes, 0),
        ("host_budget", host_budget or 0, 0),
        ("micro_batches", micro_batches, 1),
    ):
        if value < least:
            raise ConfigError(f"offload: {name} = {value}, expected a number from {least} on")
    if isinstance(match, str):
        try:
            re.compile(match)
        except re.error as error:
            raise ConfigError(
                f"offload: match = {match!r} is no regular expression: {error}"
            ) from None
    modules = dict(_matching(model, match))
    if not modules:
        raise ConfigError(f"offload: {_unmatched(model, match)}")
    for name, module in modules.items():
        if _BLOCK in module.__dict__:
            raise ConfigError(f"offload: {name} is offloaded already; detach that plan first")
    if keep_last >= len(modules):
        log.warning(
            "offload: keep_last = %d keeps all %d blocks on the device", keep_last, len(modules)
        )
    if host_budget is None:
        host_budget = available_host_memory() // 2
    store = Store(backend or default_backend(), min_bytes, host_budget)
    return OffloadPlan(modules, mode, store, budget, keep_last, micro_batches)


def repeated_class(model: nn.Module) -> type[nn.Module] | None:
    """The class of a model's repeated block: that of the `nn.ModuleList` (or `nn.Sequential`) with
    the most parameters among those of two modules or more, all of one class."""
    best, most = None, 0
    for module in model.modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < 2:
            continue
        classes = {type(child) for child in module}
        size = sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())
        if len(classes) == 1 and size > most:
            best, most = classes.pop(), size
    return best


def available_host_memory() -> int:
    """Bytes that this rank may hope for: what the machine, or the container, has left, divided by
    the ranks that share it."""
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no container, or one without a limit
        pass
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    return max(0, free) // ranks


def _matching(model: nn.Module, match: Match | None) -> Iterator[tuple[str, nn.Module]]:
    wanted = repeated_class(model) if match is None else match
    for name, module in model.named_modules():
        match wanted:
            case None:
                return
            case str():
                found = re.fullmatch(wanted, name) is not None
            case type():
                found = isinstance(module, wanted)
            case _:
                found = wanted(name, module)
        if found:
            yield name, module


def _unmatched(model: nn.Module, match: Match | None) -> str:
    if match is None:
        return (
            f"no nn.ModuleList of one class in {type(model).__name__}: say which modules are its "
            "blocks with `match`"
        )
    names = ", ".join(name for name, _ in model.named_modules() if name)
    return f"match = {match!r} fits no module of {type(model).__name__}; it has: {names[:500]}"
