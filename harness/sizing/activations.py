"""What a forward keeps for its backward, found out without memory or compute.

The forward runs on fake tensors, which have shapes and storages but no data. Whatever autograd
saves is counted, each storage once, as on a device.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

Models = Mapping[str, nn.Module]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Activations:
    """Bytes kept for backward."""

    total: int
    checkpointed: int
    """If each block keeps only its input, and one block at a time is computed again."""


class Saved:
    """Counts the tensors that autograd saves, without the models' own."""

    def __init__(self, *models: nn.Module):
        own = [tensor for m in models for tensor in (*m.parameters(), *m.buffers())]
        self._seen = {tensor.untyped_storage()._cdata for tensor in own}
        self._storages: list[Any] = []  # kept alive, so that no two have the same address
        self.bytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        """For `saved_tensors_hooks`."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._storages.append(storage)
            self.bytes += storage.nbytes()
        return tensor

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts what is saved within."""
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor):
            yield


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The model's repeated blocks: the ModuleList with the most parameters."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    largest = max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=())
    return list(largest)


def call(model: nn.Module, batch: Mapping[str, Any] | tuple[Any, ...], _: Models) -> Any:
    """Calls a model with keyword or positional arguments."""
    return model(**batch) if isinstance(batch, Mapping) else model(*batch)


def trace(
    model: nn.Module,
    batch: Any,
    dtype: str,
    forward: Callable[[nn.Module, Any, Models], Any] = call,
    others: Mapping[str, tuple[nn.Module, str]] | None = None,
) -> Activations:
    """What `forward(model, batch, others)` saves in "fp32", "bf16" or "fp16"; all may be on the
    meta device. `others`: models that the forward may go through, each with its dtype, whose
    weights do not count. Whatever the forward raises is raised.
    """
    others = others or {}
    fake = deepcopy(model).train()
    copies = {name: deepcopy(other) for name, (other, _) in others.items()}
    with FakeTensorMode(allow_non_fake_inputs=True):
        _make_fake(fake, DTYPES[dtype])
        for name, copy in copies.items():
            _make_fake(copy, DTYPES[others[name][1]])
        batch = tree_map_only(Tensor, lambda t: torch.empty_like(t, device="cpu"), batch)
        saved = Saved(fake, *copies.values())
        inputs, inside = _watch_blocks(fake, saved)
        with saved.counting():
            forward(fake, batch, copies)
    outside = saved.bytes - sum(inside)
    return Activations(saved.bytes, outside + sum(inputs) + max(inside, default=0))


def _make_fake(model: nn.Module, dtype: torch.dtype) -> None:
    """Gives a model fake weights in `dtype`; what is tied stays tied."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None and id(old) not in made:
                new = torch.empty(old.shape, dtype=dtype if old.is_floating_point() else old.dtype)
                made[id(old)] = old, nn.Parameter(new, requires_grad=old.requires_grad)
            module._parameters[name] = None if old is None else made[id(old)][1]
        for name, old in module._buffers.items():
            if old is not None:
                module._buffers[name] = torch.empty_like(old, device="cpu")


def _watch_blocks(model: nn.Module, saved: Saved) -> tuple[list[int], list[int]]:
    """Lists that a forward fills: the bytes of each block's input, and of what it saves."""
    inputs: list[int] = []
    inside: list[int] = []

    def begin(_: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(sum(a.nbytes for a in args[:1] if isinstance(a, Tensor)))
        inside.append(-saved.bytes)

    def end(*_: Any) -> None:
        inside[-1] += saved.bytes

    for block in blocks_of(model):
        block.register_forward_pre_hook(begin)
        block.register_forward_hook(end)
    return inputs, inside
