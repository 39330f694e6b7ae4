"""Offloading for an unchanged model: each call of a repeated block is a region.

A block's class is replaced by a subclass that overrides `__call__`. So `isinstance`, `state_dict`
and hooks work as before, and hooks, such as ZeRO's gathering, run again when the block is
recomputed. Copies and pickles of a block have its original class.
"""

import functools
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from harness.errors import ConfigError, compile_pattern
from harness.offload.backends import Backend, default_backend
from harness.offload.checkpointing import Inputs, call_saving, tensor_bytes
from harness.offload.counters import OffloadStats
from harness.offload.host_memory import available_host_memory
from harness.offload.planner import Fraction, Planner
from harness.offload.saved_tensor_hooks import Store
from harness.wrapper.blocks import repeated_class

log = logging.getLogger(__name__)

MIN_BYTES = 2 << 20
"""Smaller tensors stay on the device, because a copy would cost more than it saves."""

Match = type[nn.Module] | str | Callable[[str, nn.Module], bool]
Mode = Literal["inputs", "saved"]

_BLOCK = "_harness_offload_block"


class OffloadPlan:
    """Which blocks of a model are offloaded, and how. `attach` creates it."""

    def __init__(
        self,
        modules: dict[str, nn.Module],
        mode: Mode,
        store: Store,
        fraction: Fraction,
        keep_last: int,
        micro_batches: int,
    ):
        self.modules = modules
        """The blocks by name, in the model's order."""
        self.mode: Mode = mode
        self.store = store
        device = next((p.device for m in modules.values() for p in m.parameters()), None)
        self.planner = Planner(
            fraction,
            lambda: (
                store.pool.peak,
                store.backend.headroom(device or torch.device(store.backend.device_type)),
                store.backend.stall_s(),
            ),
            micro_batches,
        )
        self._kept = 0
        """Calls that stayed on the device by the plan."""
        self._reported = OffloadStats()
        for index, module in enumerate(modules.values()):
            is_last = index >= len(modules) - keep_last
            module.__dict__[_BLOCK] = _Block(self, index, is_last)
            module.__class__ = _offloaded_class(type(module))

    def detach(self) -> None:
        """Restores the blocks' classes; existing graphs stay valid. Idempotent."""
        for module in self.modules.values():
            block = module.__dict__.get(_BLOCK)
            if block is not None and block.plan is self:
                del module.__dict__[_BLOCK]
                module.__class__ = type(module).__bases__[1]
        self.store.drain()

    def drain(self) -> None:
        """For use after an exception: waits for the copies, and frees unused host memory."""
        self.store.drain()

    def stats(self) -> OffloadStats:
        """Totals so far."""
        total = self.store.stats()
        return replace(total, kept=total.kept + self._kept)

    def step_metrics(self) -> dict[str, float]:
        """Totals since the last call, as `offload/...`."""
        stats = self.stats()
        since, self._reported = stats.since(self._reported), stats
        return {f"offload/{name}": float(value) for name, value in asdict(since).items()}

    def run(
        self, index: int, is_last: bool, function: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Calls a block."""
        inputs = Inputs(function, args, kwargs) if self.mode == "inputs" else None
        size = tensor_bytes(tree_leaves((args, kwargs)) if inputs is None else inputs.tensors)
        is_offloaded = self.planner.wants(index, size, self.store.unpacked) and not is_last
        if not is_offloaded and size >= self.store.min_bytes:
            self._kept += 1
        if inputs is not None:
            return inputs.call(self.store if is_offloaded else None)
        if is_offloaded:
            return call_saving(self.store, function, args, kwargs)
        return function(*args, **kwargs)


class _Block:
    """A module's entry in a plan."""

    def __init__(self, plan: OffloadPlan, index: int, is_last: bool):
        self.plan, self.index, self.is_last = plan, index, is_last


class _Offloaded(nn.Module):
    """The first base of the classes that `_offloaded_class` creates; the second is the module's own
    class."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Prevents the `__init_subclass__` of the module's own class from running."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced: Any = super().__reduce_ex__(protocol)
        _, _, state, *rest = reduced
        state = {key: value for key, value in state.items() if key != _BLOCK}
        return object.__new__, (type(self).__bases__[1],), state, *rest


@functools.cache
def _offloaded_class(plain: type[nn.Module]) -> type[nn.Module]:
    """The offloading subclass of a class. In eval mode or without gradients, its call is plain."""

    @torch.compiler.disable  # does not affect a compiled block, which is called from here
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        function = functools.partial(plain.__call__, self)
        if not (self.training and torch.is_grad_enabled()):
            return function(*args, **kwargs)
        block: _Block = self.__dict__[_BLOCK]
        return block.plan.run(block.index, block.is_last, function, args, kwargs)

    names = {key: getattr(plain, key) for key in ("__module__", "__qualname__", "__doc__")}
    return type(plain.__name__, (_Offloaded, plain), names | {"__call__": call})


def attach(
    model: nn.Module,
    match: Match | None = None,
    *,
    mode: Mode = "inputs",
    fraction: Fraction = "auto",
    keep_last: int = 1,
    min_bytes: int = MIN_BYTES,
    host_bytes: int | None = None,
    micro_batches: int = 1,
    backend: Backend | None = None,
) -> OffloadPlan:
    """Offloads the activations of a model's blocks while it trains; `OffloadPlan.detach` undoes it.

    - `match` selects the blocks: a class, a regular expression for full names, or a function of
      name and module; by default the modules of `repeated_class(model)`.
    - `mode`: "inputs" moves a block's inputs to host memory and recomputes the rest in backward;
      "saved" moves all tensors that it saves and recomputes nothing, at many times the traffic.
    - `fraction`: "all", a fraction of the blocks from 0 to 1, or "auto": as many as the device's
      memory requires.
    - `keep_last`: the number of last blocks not to offload, because backward needs them immediately
      (in mode "inputs" they are still recomputed).
    - `min_bytes`: smaller tensors stay on the device.
    - `host_bytes`: maximum pinned host memory; by default half of the available memory, divided by
      the ranks of this machine. What does not fit stays on the device.
    - `micro_batches`: micro-batches per optimizer step (gradient accumulation). "auto" decides
      after the first step, in which the optimizer allocates its state.

    Losses, gradients and random generators are bit-identical to the plain model's. Raises
    ConfigError if nothing matches, a block is already offloaded, or a setting is invalid.
    """
    _check_settings(
        mode,
        match,
        {"keep_last": (keep_last, 0), "min_bytes": (min_bytes, 0)}
        | {"host_bytes": (host_bytes or 0, 0), "micro_batches": (micro_batches, 1)},
    )
    modules = dict(_matching(model, match))
    if not modules:
        raise ConfigError(f"offload: {_unmatched(model, match)}")
    for name, module in modules.items():
        if _BLOCK in module.__dict__:
            raise ConfigError(f"offload: {name} is already offloaded: detach the other plan first")
    if keep_last >= len(modules):
        log.warning(
            "offload: keep_last = %d keeps all %d blocks on the device", keep_last, len(modules)
        )
    if host_bytes is None:
        host_bytes = available_host_memory() // 2
    store = Store(backend or default_backend(), min_bytes, host_bytes)
    return OffloadPlan(modules, mode, store, fraction, keep_last, micro_batches)


def _check_settings(mode: str, match: Match | None, numbers: dict[str, tuple[int, int]]) -> None:
    """Raises ConfigError for an invalid setting. `numbers`: (value, minimum) by name."""
    if mode not in ("inputs", "saved"):
        raise ConfigError(f'offload: mode = {mode!r}, expected "inputs" or "saved"')
    for name, (value, minimum) in numbers.items():
        if value < minimum:
            raise ConfigError(f"offload: {name} = {value}, expected a number >= {minimum}")
    if isinstance(match, str):
        try:
            compile_pattern(match)
        except ValueError as error:
            raise ConfigError(f"offload: match = {error}") from None


def _matching(model: nn.Module, match: Match | None) -> Iterator[tuple[str, nn.Module]]:
    selector = repeated_class(model) if match is None else match
    for name, module in model.named_modules():
        match selector:
            case None:
                return
            case str():
                is_block = re.fullmatch(selector, name) is not None
            case type():
                is_block = isinstance(module, selector)
            case _:
                is_block = selector(name, module)
        if is_block:
            yield name, module


def _unmatched(model: nn.Module, match: Match | None) -> str:
    if match is None:
        return (
            f"{type(model).__name__} has no nn.ModuleList of one class: select its blocks with "
            "`match`"
        )
    names = ", ".join(name for name, _ in model.named_modules() if name)
    return f"match = {match!r} matches no module of {type(model).__name__}; it has: {names[:500]}"
