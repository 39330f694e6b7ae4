"""The runs that changed ones are compared with, once a session."""

from collections.abc import Callable

import pytest

from harness.config import Config
from harness.run import run_in_world
from harness.testing.pool import RankPool
from tests.support.helpers import tiny_config


@pytest.fixture(scope="session")
def plain_runs(
    two_ranks: RankPool, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Config]:
    """The default run by ZeRO stage."""
    done: dict[int, Config] = {}

    def run(stage: int) -> Config:
        if stage not in done:
            done[stage] = tiny_config(tmp_path_factory.mktemp("plain"), stage)
            two_ranks.run(run_in_world, done[stage])
        return done[stage]

    return run
