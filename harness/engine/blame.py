"""Which module's output or gradient was the first that was not finite, on which rank.

A step that was not finite is run again, with hooks on every module, from the same random generators
and buffers; it is skipped again, whatever comes of it. Nothing is looked at in other steps: only
their micro-batches are kept until their end, and the state of the random generators.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from harness import distributed
from harness.data.step_batches import Terms
from harness.distributed.rng import rng_state, set_rng_state
from harness.engine.engine import Engine
from harness.engine.engines import Engines
from harness.utils import tensor_leaves, to_device
from harness.zero.engine_state import uncounted


class KeptStep:
    """What a step is made of, to run it again."""

    def __init__(self, engines: Engines, terms: Terms | None):
        """Before the step."""
        self._engines = engines
        self._terms = terms
        self._rng = rng_state()
        self._counters = {engine.name: copy(engine.counters) for engine in engines.trained}
        self._batches: list[Any] = []

    def keep(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The micro-batches, which are kept as they are taken."""
        for batch in batches:
            self._batches.append(batch)
            yield batch

    def blame(self, name: str) -> list[tuple[int, int, str]]:
        """Runs the step of one engine again. `(rank, micro-batch, what was found)` of those in
        which something was not finite, the same on every rank. Collective."""
        engine = self._engines[name]
        rng, counters, scale = rng_state(), engine.counters, engine.loss_scale
        finding = _Finding(self._engines)
        set_rng_state(self._rng)
        engine.counters = copy(self._counters[name])
        engine.largest_norm = -1.0  # no step is taken
        try:
            with uncounted(engine.ds), finding.hooked():
                for number, batch in enumerate(self._batches):
                    finding.begin(number, batch, engine)
                    batch = to_device(batch, distributed.device())
                    self._engines.feed_again(engine, batch, self._terms, number, finding.see_loss)
        finally:
            engine.counters, engine.largest_norm = counters, float("inf")
            if engine.has_loss_scale:
                engine.set_loss_scale(scale)
            engine.arrivals.take()
            set_rng_state(rng)
        per_rank = distributed.all_gather(finding.found)
        return [(rank, *item) for rank, found in enumerate(per_rank) for item in found.items()]


class _Finding:
    """What is the first that is not finite, by micro-batch of this rank."""

    def __init__(self, engines: Engines):
        self.found: dict[int, str] = {}
        self._number = 0
        several = len(engines) > 1
        self._modules: dict[str, nn.Module] = {
            ".".join(filter(None, [engine.name if several else "", path])): module
            for engine in engines.values()
            for path, module in engine.module.named_modules()
        }
        self._parameters = {
            ".".join(filter(None, [engine.name if several else "", path])): parameter
            for engine in engines.trained
            for path, parameter in engine.module.named_parameters()
            if parameter.requires_grad
        }

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """In the block every output and gradient is looked at."""
        hooks: list[Any] = [
            module.register_forward_hook(partial(self._see_output, path))
            for path, module in self._modules.items()
        ]
        for path, parameter in self._parameters.items():
            see = partial(self._see_gradient, f"the gradient of {path}")
            hooks.append(parameter.register_hook(see))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def begin(self, number: int, batch: Any, engine: Engine) -> None:
        """Begins a micro-batch."""
        self._number = number
        if not engine.weights_are_finite():
            self._find("a weight, before the step")
        if not _is_finite(batch):
            self._find("the batch")

    def see_loss(self, loss: Tensor) -> None:
        """Between forward and backward."""
        if not _is_finite(loss):
            self._find("the loss, although the outputs of all modules are finite")

    def _find(self, text: str) -> None:
        self.found.setdefault(self._number, text)

    def _see_output(self, path: str, module: nn.Module, inputs: Any, output: Any) -> None:
        name = f"{path or 'the model'} ({type(module).__name__})"
        if not _is_finite(output):
            whose = "its inputs are finite" if _is_finite(inputs) else "an input is not finite"
            self._find(f"the output of {name}, {whose}")
        for tensor in tensor_leaves(output):
            if tensor.requires_grad:
                see = partial(self._see_gradient, f"the gradient of the output of {name}")
                tensor.register_hook(see)

    def _see_gradient(self, what: str, gradient: Tensor) -> None:
        if not _is_finite(gradient):
            self._find(what)


@torch.no_grad()
def _is_finite(tree: Any) -> bool:
    """Whether all numbers in a tree are. Waits for the device."""
    return all(bool(tensor.isfinite().all()) for tensor in tensor_leaves(tree))
