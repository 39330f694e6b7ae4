"""Philox against Random123's known answers, and blocks that are slices of the whole."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch

from harness.optim.apollo.philox import Key, gaussian, key_of, philox4x32, rademacher

Maker = Callable[[range, range, Sequence[int], Sequence[Key], torch.device], torch.Tensor]
CPU = torch.device("cpu")
KEY = key_of(0, "layer.weight")

# From `kat_vectors` of Random123, for philox4x32 with 10 rounds: counter, key, answer.
KNOWN_ANSWERS = [
    (
        [0x00000000] * 4,
        (0x00000000, 0x00000000),
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
    ),
    (
        [0xFFFFFFFF] * 4,
        (0xFFFFFFFF, 0xFFFFFFFF),
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
    ),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter: list[int], key: tuple[int, int], answer: list[int]) -> None:
    c0, c1, c2, c3, k0, k1 = (torch.tensor([word]) for word in (*counter, *key))
    assert [int(word) for word in philox4x32((c0, c1, c2, c3), (k0, k1))] == answer


@pytest.mark.parametrize("make", [gaussian, rademacher])
def test_every_block_is_a_slice_of_the_full_matrix(make: Maker) -> None:
    whole = make(range(300), range(150), [2], [KEY], CPU)[0]
    for rows in (range(0, 1), range(3, 50), range(299, 300), range(120, 300)):
        for columns in (range(0, 150), range(1, 7), range(127, 150), range(6, 131)):
            block = make(rows, columns, [2], [KEY], CPU)[0]
            assert torch.equal(block, whole[rows.start : rows.stop, columns.start : columns.stop])


@pytest.mark.parametrize("make", [gaussian, rademacher])
def test_refreshes_names_and_seeds_are_independent(make: Maker) -> None:
    size = range(200), range(100)
    one = make(*size, [0], [KEY], CPU)
    addresses = [(1, KEY), (0, key_of(0, "other.weight")), (0, key_of(1, "layer.weight"))]
    others = [make(*size, [refresh], [key], CPU) for refresh, key in addresses]
    for other in [*others, make(range(200, 400), range(100), [0], [KEY], CPU)]:
        correlation = (one * other).mean().abs() * math.sqrt(one.numel())
        assert correlation < 4  # standard deviations


def test_the_distributions() -> None:
    normal = gaussian(range(1000), range(100), [0], [KEY], CPU).double()
    for power, expected, deviation in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        found = (normal**power).mean().item()
        assert abs(found - expected) < 4 * math.sqrt(deviation / normal.numel())
    assert normal.abs().max() > 4
    signs = rademacher(range(1000), range(100), [0], [KEY], CPU)
    assert signs.unique().tolist() == [-1, 1]
    assert signs.mean().abs() < 4 / math.sqrt(signs.numel())
