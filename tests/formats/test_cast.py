"""Casts of floating-point numbers agree with torch's, to the bit."""

import pytest
import torch

from harness.formats.cast import cast, is_same
from harness.formats.dtypes import FLOATS

SPECIAL = [0.0, -0.0, 1.0, float("inf"), -float("inf"), 65504.0, 65520.0, 1e-8, 3.4e38, 1.17e-38]


def numbers() -> torch.Tensor:
    """float32 of every kind: random bits, ties between two bfloat16, and special values."""
    generator = torch.Generator().manual_seed(3)
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=generator, dtype=torch.int64)
    ties = (bits[:50_000] & ~0xFFFF) | 0x8000
    found = torch.cat([bits, ties]).to(torch.int32).view(torch.float32)
    return torch.cat([found, torch.tensor(SPECIAL)])


@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_casts_are_torch_s(dtype: str, target: str) -> None:
    tensor = numbers().to(getattr(torch, dtype))
    expected = tensor.to(getattr(torch, target))
    raw = tensor.view(torch.uint8).numpy().tobytes()
    found = torch.frombuffer(bytearray(cast(raw, dtype, target)), dtype=getattr(torch, target))
    assert torch.equal(found.isnan(), expected.isnan()) and expected.isnan().any()
    is_number = ~expected.isnan()
    width = getattr(torch, f"int{8 * expected.itemsize}")
    assert torch.equal(found.view(width)[is_number], expected.view(width)[is_number])


def test_one_nan_is_as_good_as_another() -> None:
    """Which bits a NaN has after rounding depends on the machine."""
    numbers = torch.tensor([1.5, torch.nan, -2.0]).bfloat16()
    one = numbers.view(torch.int16).clone()
    other = one.clone()
    one[1], other[1] = 0x7FC0, -1  # both NaN
    assert is_same(bytes_of(one), bytes_of(other), "bfloat16")
    other[0] += 1
    assert not is_same(bytes_of(one), bytes_of(other), "bfloat16")


def bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).numpy().tobytes())
