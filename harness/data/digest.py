"""A digest of a sample or of a batch, to see whether two are the same."""

import hashlib
import pickle
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from harness.utils import named_parts


def digest(tree: Any) -> str:
    """A digest of what a sample or a batch contains; equal for equal ones, in any process."""
    hashed = hashlib.blake2b(digest_size=8)
    _update(hashed, tree)
    return hashed.hexdigest()


def _update(hashed: Any, tree: Any) -> None:
    for leaf in tree_leaves(tree):
        named = named_parts(leaf)
        if named is not None:
            _update(hashed, named)
        elif isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided:
            hashed.update(f"{leaf.dtype} {list(leaf.shape)}".encode())
            hashed.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        elif isinstance(leaf, np.ndarray) and not leaf.dtype.hasobject:
            hashed.update(f"{leaf.dtype} {leaf.shape}".encode())
            hashed.update(np.ascontiguousarray(leaf).tobytes())
        else:
            hashed.update(_pickled(leaf))


def _pickled(leaf: Any) -> bytes:
    try:
        return pickle.dumps(leaf)
    except Exception:  # it cannot be compared, and so counts for its kind alone
        return type(leaf).__qualname__.encode()
