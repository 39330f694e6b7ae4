"""Calls whose tensors go to host memory: their inputs, for recomputation, or all saved tensors.

The former is activation checkpointing (Chen et al. 2016, "Training Deep Nets with Sublinear Memory
Cost") with inputs in host memory: Daniel Han and the Unsloth team's offloaded gradient
checkpointing (2024). Torch's non-reentrant checkpoint recomputes, and restores random generators
and autocast; a saved-tensor hook around it sees only what it saves, the inputs.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from harness.offload.saved_tensor_hooks import CHUNK, Recorder, Store


class Inputs:
    """A call's tensors, and how to repeat the call with them."""

    __slots__ = ("_repeat", "tensors")

    def __init__(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ):
        if not kwargs and all(isinstance(arg, torch.Tensor) for arg in args):
            self.tensors: Sequence[torch.Tensor] = args
            self._repeat = function
        else:
            self.tensors, self._repeat = _split_arguments(function, args, kwargs)

    def call(self, store: Store | None) -> Any:
        """Makes the call, which backward recomputes; its inputs go to `store`, if any."""
        if store is None:
            return checkpoint(self._repeat, *self.tensors, use_reentrant=False)
        with saved_tensors_hooks(Recorder(store).pack, Recorder.unpack):
            return checkpoint(self._repeat, *self.tensors, use_reentrant=False)


def tensor_bytes(leaves: Iterable[Any]) -> int:
    """Bytes of the tensors among `leaves`."""
    return sum(t.numel() * t.element_size() for t in leaves if isinstance(t, torch.Tensor))


def call_saving(
    store: Store, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Makes the call, and moves the tensors that it saves for backward to `store`."""
    with saved_tensors_hooks(Recorder(store, CHUNK).pack, Recorder.unpack):
        return function(*args, **kwargs)


def _split_arguments(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[torch.Tensor], Callable[..., Any]]:
    """The tensors in nested arguments, and the call as a function of them.

    The forward gets the caller's own containers, so that the caller sees changes to them; the
    recomputation gets copies made before the forward.
    """
    leaves, spec = tree_flatten((tuple(args), dict(kwargs)))
    caches = [index for index, leaf in enumerate(leaves) if hasattr(leaf, "get_seq_length")]
    for index in caches:
        leaves[index] = _without_cache(leaves[index])
    first = None if caches else (args, kwargs)
    indices = [index for index, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    tensors = [leaves[index] for index in indices]
    for index in indices:
        leaves[index] = None

    def repeat(*tensors: torch.Tensor) -> Any:
        nonlocal first
        if first is not None:
            (args, kwargs), first = first, None
        else:
            filled = list(leaves)
            for index, tensor in zip(indices, tensors, strict=True):
                filled[index] = tensor
            args, kwargs = tree_unflatten(filled, spec)
        return function(*args, **kwargs)

    return tensors, repeat


def _without_cache(cache: Any) -> None:
    """Replaces an empty key-value cache with None, as transformers does for its own checkpointing:
    recomputation would write to it a second time, and training never reads it."""
    if cache.get_seq_length():
        raise RuntimeError(
            f"offload: a block was called with a {type(cache).__name__} that holds "
            f"{cache.get_seq_length()} tokens; recomputation in backward would write to it a "
            'second time: train with use_cache=False, or offload with mode="saved"'
        )
