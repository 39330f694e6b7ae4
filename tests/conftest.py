"""Shared fixtures: pools of ranks for the entire session, and the `--slow` option."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

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


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of a real S3 server on this machine, with a bucket."""
    pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    command = [sys.executable, "-m", "moto.server", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        address = next(line.split()[-1] for line in server.stderr if "Running on http://" in line)
        threading.Thread(target=server.stderr.read, daemon=True).start()  # it logs each request
        s3fs.S3FileSystem(key="none", secret="none", endpoint_url=address).mkdir("bucket")
        yield address
        server.kill()


@pytest.fixture
def s3(s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A URL of the server, with credentials for it."""
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    s3fs.S3FileSystem.clear_instance_cache()
    yield f"s3://bucket{tmp_path}"
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(params=["memory", "file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a store of each kind."""
    if request.param == "s3":
        return request.getfixturevalue("s3")
    return f"{request.param}://{tmp_path}/runs"
