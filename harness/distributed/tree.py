"""Values of all ranks combined up a tree of the ranks, and a value sent down it.

A rank exchanges messages with its parent and its children only. Half of the ranks have no child,
none has more than log2(ranks), and after 2 log2(ranks) hops every rank has what all together have
contributed; gloo's own all-reduce is a ring of 2 (ranks - 1) hops. The first children are the next
ranks, which are of the same node: few messages leave it.
"""

import pickle
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from harness.distributed.world import control_group

T = TypeVar("T")

Combine = Callable[[Tensor, Tensor], object]
"""Combines the second tensor into the first, in place."""


class Place(NamedTuple):
    """Where a rank is in a tree."""

    parent: int | None
    """None of the root."""
    children: tuple[int, ...]
    """Those with fewer ranks below them come first."""


@lru_cache
def place_of(rank: int, ranks: Sequence[int], root: int) -> Place:
    """The place of `rank` in a binomial tree of `ranks`, whose root is the rank `root`.

    Counted from the root, number n is below n without its lowest bit: all numbers from n on, up to
    the next one that is not below n, are below n.
    """
    size, start = len(ranks), ranks.index(root)
    number = (ranks.index(rank) - start) % size
    lowest = number & -number or size
    steps = [1 << bit for bit in range(size.bit_length())]
    below = [number + step for step in steps if step < lowest and number + step < size]
    parent = None if number == 0 else ranks[(start + number - lowest) % size]
    return Place(parent, tuple(ranks[(start + child) % size] for child in below))


def all_reduce(tensor: Tensor, combine: Combine, place: Place, tag: int) -> None:
    """Overwrites `tensor` by those of all ranks combined, the same bits on every rank. Blocks.

    Every rank passes the same shape and dtype. Collective over the ranks of the tree.
    """
    group = control_group()
    if place.children:
        received = torch.empty_like(tensor)
        for child in place.children:
            group.recv([received], child, tag).wait()
            combine(tensor, received)
    if place.parent is not None:
        group.send([tensor], place.parent, tag).wait()
        group.recv([tensor], place.parent, tag).wait()
    for work in [group.send([tensor], child, tag) for child in reversed(place.children)]:
        work.wait()


def reduce(value: T, combine: Callable[[T, T], T], place: Place, tag: int) -> T | None:
    """The values of all ranks (any picklable objects), combined in the order of the ranks, at the
    root; None elsewhere. Collective over the ranks of the tree."""
    for child in place.children:
        value = combine(value, pickle.loads(_receive(child, tag)))
    if place.parent is None:
        return value
    _send(pickle.dumps(value), [place.parent], tag)
    return None


def broadcast(value: T, place: Place, tag: int) -> T:
    """The root's value (any picklable object). Collective over the ranks of the tree."""
    if place.parent is None:
        text = pickle.dumps(value) if place.children else b""
    else:
        text = _receive(place.parent, tag)
        value = pickle.loads(text)
    _send(text, place.children[::-1], tag)
    return value


def _send(text: bytes, ranks: Sequence[int], tag: int) -> None:
    """Its size, then the text, to all of them at once."""
    if not ranks:
        return
    tensors = torch.tensor([len(text)]), torch.frombuffer(bytearray(text), dtype=torch.uint8)
    group = control_group()
    for work in [group.send([tensor], rank, tag) for rank in ranks for tensor in tensors]:
        work.wait()


def _receive(rank: int, tag: int) -> bytes:
    size = torch.empty(1, dtype=torch.int64)
    control_group().recv([size], rank, tag).wait()
    text = torch.empty(int(size), dtype=torch.uint8)
    control_group().recv([text], rank, tag).wait()
    return text.numpy().tobytes()
