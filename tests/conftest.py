"""Shared fixtures: pools of ranks for the entire session, and the `--slow` option."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache

import pytest
import torch

from harness.testing.pool import RankPool
from tests.support.helpers import Pools


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    """Hides the GPUs, also from subprocesses, from all tests but those of `-m gpu`.

    By both: DeepSpeed's launcher gives its ranks another CUDA_VISIBLE_DEVICES, also on CPUs.
    """
    if config.getoption("markexpr") != "gpu":
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # The longest room first: at the end, one of two processes would wait for the other.
    items.sort(key=lambda item: item.path.parent.name != "zoo")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    """The session's pool of so many ranks, made when it is first asked for."""
    with ExitStack() as stack:
        yield cache(lambda ranks: stack.enter_context(RankPool(ranks)))


@pytest.fixture(scope="session")
def two_ranks(pools: Pools) -> RankPool:
    return pools(2)


@pytest.fixture(scope="session")
def three_ranks(pools: Pools) -> RankPool:
    return pools(3)


@pytest.fixture(scope="session")
def four_ranks(pools: Pools) -> RankPool:
    return pools(4)
