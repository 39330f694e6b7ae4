"""The random generators of one rank, as plain values that load without executing pickled code."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from harness.distributed.world import device


def rng_state() -> dict[str, Any]:
    """The state of Python's, numpy's and torch's generators."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
    }
    if device().type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restores what `rng_state` returned."""
    random.setstate(state["python"])
    name, keys, *others = state["numpy"]
    np.random.set_state((name, keys.numpy(), *others))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and device().type == "cuda":
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def seeded(*words: int) -> Iterator[None]:
    """Seeds all generators from `words` (each >= 0) within the context, and restores them."""
    before = rng_state()
    seed_host(*words)
    if device().type == "cuda":
        torch.cuda.manual_seed(torch.initial_seed())
    try:
        yield
    finally:
        set_rng_state(before)


def seed_host(*words: int) -> None:
    """Seeds Python's, numpy's and torch's generators on the CPU from `words`, each >= 0.

    `torch.manual_seed` takes a hundred times as long where a GPU is not in use: it keeps the stack
    of its caller, for the case that one is used later.
    """
    seeds = np.random.SeedSequence(words).generate_state(3)
    random.seed(int(seeds[0]))
    np.random.seed(int(seeds[1]))
    torch.default_generator.manual_seed(int(seeds[2]))


def seed_everything(seed: int) -> None:
    """Seeds Python, numpy and torch (every device) of this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
