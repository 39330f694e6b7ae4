"""Structures to be stored, and the comparison of what is loaded with what was saved."""

import math
from argparse import Namespace
from collections import Counter, OrderedDict, deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from harness.io.shared_memory import is_dense, unexpanded
from harness.io.structure import DTYPES

ARRAYS = ["?", "<f2", "<f4", ">f8", "<i8", "u1", "<c8", "<c16", "<U3", "S4", "<M8[ms]", "m8[25s]"]


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """The tensors of a structure, in order, one as often as it is held."""
    match tree:
        case torch.Tensor():
            return [tree]
        case dict():
            return [tensor for value in tree.values() for tensor in tensors_in(value)]
        case Namespace() | SimpleNamespace():
            return tensors_in(vars(tree))
        case list() | tuple() | deque():
            return [tensor for value in tree for tensor in tensors_in(value)]
    return []


def assert_same(found: Any, saved: Any) -> None:
    """Fails unless both are the same: types, values to the bit, and what shares memory."""
    _assert_equal(found, saved)
    pairs = list(zip(tensors_in(found), tensors_in(saved), strict=True))
    for number, pair in enumerate(pairs):
        for dimension in range(-1, pair[0].dim()):  # all of it, then the first of each dimension
            for tensor in pair:
                part = tensor.detach()
                if dimension >= 0:
                    part = part.narrow(dimension, 0, min(1, part.size(dimension)))
                _bytes(unexpanded(part)).fill_((7 * number + dimension) % 254 + 1)
            for ours, theirs in pairs:
                assert torch.equal(_bits(ours), _bits(theirs)), "memory is shared differently"


def _assert_equal(found: Any, saved: Any) -> None:
    assert type(found) is type(saved)
    match saved:
        case torch.Tensor():
            assert found.dtype == saved.dtype and found.shape == saved.shape
            assert found.requires_grad == saved.requires_grad
            if saved.numel() and is_dense(saved.shape, saved.stride()):
                steps = zip(saved.shape, found.stride(), saved.stride(), strict=True)
                assert all(ours == theirs for size, ours, theirs in steps if size > 1)
            assert torch.equal(_bits(found), _bits(saved))
        case np.ndarray() | np.generic():
            assert found.dtype == saved.dtype and found.shape == saved.shape
            assert found.tobytes() == saved.tobytes()
        case dict():
            assert list(map(_text, found)) == list(map(_text, saved))  # the order, and nan
            for ours, theirs in zip(found.values(), saved.values(), strict=True):
                _assert_equal(ours, theirs)
            attributes = getattr(found, "__dict__", None), getattr(saved, "__dict__", None)
            _assert_equal(*attributes)
        case Namespace() | SimpleNamespace():
            _assert_equal(vars(found), vars(saved))
        case list() | tuple() | deque():
            assert len(found) == len(saved)
            for ours, theirs in zip(found, saved, strict=True):
                _assert_equal(ours, theirs)
        case float() | complex() | set() | frozenset():
            assert _text(found) == _text(saved)
        case _:
            assert found == saved


def _text(value: Any) -> str:
    """`repr`, which distinguishes all numbers; sets are sorted, as nan makes their order random."""
    match value:
        case set() | frozenset():
            return f"{type(value)} {sorted(map(_text, value))}"
        case tuple():
            return f"({', '.join(map(_text, value))})"
        case _:
            return repr(value)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a tensor as bytes, to be written to."""
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    bytes_ = torch.empty(0, dtype=torch.uint8)
    size, stride, width = tensor.shape, tensor.stride(), tensor.itemsize
    start = int(tensor.storage_offset()) * width
    steps = (*(step * width for step in stride), 1)
    return bytes_.set_(tensor.untyped_storage(), start, (*size, width), steps)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach().resolve_conj().resolve_neg()
    return _bytes(tensor)


def memory(draw: st.DrawFn) -> torch.Tensor:
    """A contiguous tensor of random bits, of any dtype."""
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    if dtype == getattr(torch, "float4_e2m1fn_x2", None):
        shape = shape or (1,)
    size = math.prod(shape) * dtype.itemsize
    seed = draw(st.integers(0, 2**31))
    top = 2 if dtype == torch.bool else 256
    bits = torch.randint(top, (size,), dtype=torch.uint8, generator=torch.manual_seed(seed))
    return bits.view(dtype).view(shape)


@st.composite
def views(draw: st.DrawFn, base: torch.Tensor) -> torch.Tensor:
    """The tensor, or some view of it."""
    tensor = base
    for kind in draw(
        st.lists(st.sampled_from(["turn", "cut", "step", "expand", "window"]), max_size=3)
    ):
        if kind == "expand":
            tensor = tensor.expand(draw(st.integers(1, 3)), *tensor.shape)
        elif not tensor.dim():
            continue
        elif kind == "turn":
            tensor = tensor.transpose(0, -1)
        elif kind == "cut":
            start = draw(st.integers(0, tensor.size(0)))
            tensor = tensor[start : draw(st.integers(start, tensor.size(0)))]
        elif kind == "step":
            tensor = tensor[:: draw(st.integers(1, 3))]
        elif tensor.size(-1) > 1:
            tensor = tensor.unfold(-1, 2, 1)
    return tensor


@st.composite
def families(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """A few tensors, some of which share memory."""
    pool = [memory(draw) for _ in range(draw(st.integers(1, 2)))]
    names = draw(st.permutations(["a", "b", "c", "d"]))
    return {name: draw(views(draw(st.sampled_from(pool)))) for name in names}


@st.composite
def structures(draw: st.DrawFn) -> Any:
    """Anything that can be stored."""
    pool = [memory(draw) for _ in range(draw(st.integers(1, 3)))]

    @st.composite
    def tensors(draw: st.DrawFn) -> torch.Tensor:
        tensor = draw(views(draw(st.sampled_from(pool))))
        if tensor.is_floating_point() and tensor.itemsize > 1 and draw(st.booleans()):
            return torch.nn.Parameter(tensor, requires_grad=draw(st.booleans()))
        return tensor.view_as(tensor)

    @st.composite
    def arrays(draw: st.DrawFn) -> Any:
        dtype = np.dtype(draw(st.sampled_from(ARRAYS)))
        shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
        count = math.prod(shape)
        values = np.array([draw(st.integers(0, 100)) for _ in range(count)]).astype(dtype)
        array = values.reshape(shape)
        return array[()] if not shape and draw(st.booleans()) else array

    floats = st.floats()
    plain = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.integers(-(2**200), 2**200),
        floats,
        st.complex_numbers(),
        st.text(st.characters(exclude_categories=()), max_size=4),
        st.binary(max_size=4),
    )
    keys = plain | st.tuples(plain, plain)
    leaves = st.one_of(
        plain,
        tensors(),
        tensors(),
        arrays(),
        st.binary(max_size=4).map(bytearray),
        st.sampled_from(sorted(DTYPES)).map(DTYPES.__getitem__),
        st.lists(st.integers(0, 9), max_size=3).map(torch.Size),
        st.sampled_from(["cpu", "cuda:1", "meta"]).map(torch.device),
        st.sets(keys, max_size=3),
        st.frozensets(keys, max_size=3),
        st.integers(60, 70).map(lambda size: list(range(-size, size * 3, 3))),
        st.integers(60, 70).map(lambda size: tuple(map(float, range(size)))),
        st.sampled_from(["x" * 2000, "\udc80ä" * 1000, b"\0" * 3000]),
    )

    def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        names = st.text(st.characters(exclude_categories=()), max_size=3) | st.sampled_from(
            ["a", "a.b", "b", "__metadata__", "__harness__.0", "dict", "tensor"]
        )
        return st.one_of(
            st.dictionaries(names, inner, max_size=4),
            st.dictionaries(keys, inner, max_size=4),
            st.dictionaries(names, inner, max_size=4).map(OrderedDict),
            st.dictionaries(names, st.integers(), max_size=4).map(Counter),
            st.lists(inner, max_size=4),
            st.lists(inner, max_size=4).map(tuple),
        )

    return draw(st.recursive(leaves, containers, max_leaves=8))
