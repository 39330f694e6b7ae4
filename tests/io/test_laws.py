"""`load(save(x))` is x, whatever x holds, in both formats."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from harness.io import load, save
from tests.support.structures import assert_same, families, structures

LAWS = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


def check(data: Any, suffix: str, lazy: bool) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / f"x{suffix}"
        save(data, path)
        assert_same(load(path, lazy=lazy), data)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("suffix", [".sft", ".pt"])
@settings(LAWS, max_examples=40)
@given(structures())
def test_what_was_saved_is_loaded(suffix: str, lazy: bool, data: Any) -> None:
    check(data, suffix, lazy)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("suffix", [".sft", ".pt"])
@settings(LAWS, max_examples=40)
@given(families())
def test_what_shared_memory_shares_it_again(suffix: str, lazy: bool, data: Any) -> None:
    check(data, suffix, lazy)
