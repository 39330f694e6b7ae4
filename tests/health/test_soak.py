"""Random faults under `harness run`: `tests/support/soak.py`."""

import multiprocessing
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.soak import FAULTS_A_RUN, soak

QUICK = ("kill", "raise all", "save", "launcher", "term")


def soak_in_fork(
    path: Sequence[str], directory: Path, faults: int, seed: int, kinds: Sequence[str] | None
) -> None:
    sys.path[:] = path
    soak(directory, faults, seed, kinds)


def survive(directory: Path, faults: int, seed: int, kinds: Sequence[str] | None = None) -> None:
    """In a process of its own, which adopts all orphans, forked from one that has torch."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["harness.testing.preload"])
    args = (list(sys.path), directory, faults, seed, kinds)
    process = server.Process(target=soak_in_fork, args=args)
    process.start()
    process.join()
    assert process.exitcode == 0, f"see the output of seed {seed}"


@pytest.mark.timeout(300)
def test_five_faults_change_nothing(tmp_path: Path) -> None:
    survive(tmp_path, FAULTS_A_RUN, seed=1, kinds=QUICK)


@pytest.mark.slow
@pytest.mark.timeout(6 * 3600)
def test_500_faults_change_nothing(tmp_path: Path) -> None:
    survive(tmp_path, 500, seed=random.randrange(2**32))
