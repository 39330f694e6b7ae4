"""The complete tensors of an engine's model, one at a time."""

import logging
from collections.abc import Iterator

import torch

from harness import distributed
from harness.engine.engine import Engine
from harness.zero import engine_state

log = logging.getLogger(__name__)


def full_tensors(engine: Engine) -> Iterator[tuple[str, torch.Tensor | None]]:
    """The model's parameters, persistent buffers and extra state, complete, one at a time.

    `(name, tensor)`, copies on rank 0's CPU (tied tensors stay one tensor); None elsewhere. Extra
    state (`Module.get_extra_state`) that is not a tensor is logged and skipped. Collective: at ZeRO
    stage 3 every parameter is gathered. Raises HarnessError, on all ranks and after the last
    tensor, if rank 0 runs out of memory.
    """
    copies: dict[int, torch.Tensor] = {}
    failure: Exception | None = None
    state = engine.module.state_dict(keep_vars=True)
    tensors = {name: value for name, value in state.items() if torch.is_tensor(value)}
    if skipped := sorted(state.keys() - tensors.keys()):
        log.info("engine %s: skipped, not a tensor: %s", engine.name, ", ".join(skipped))
    for name, tensor in tensors.items():
        with engine_state.gathered(tensor):
            if distributed.is_global_leader() and id(tensor) not in copies and not failure:
                try:
                    copies[id(tensor)] = tensor.detach().cpu().clone()
                except Exception as error:  # the other ranks must not wait for this one
                    failure = error
        yield name, copies.get(id(tensor))
    with distributed.raise_on_all_ranks(f"cannot gather engine {engine.name!r}"):
        if failure is not None:
            raise failure
