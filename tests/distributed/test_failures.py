"""A rank that fails alone is named by the others, and they end with it."""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import (
    DistNetworkError,  # pyright: ignore[reportPrivateImportUsage]
    DistStoreError,  # pyright: ignore[reportPrivateImportUsage]
)

from harness import distributed
from harness.distributed.abort import abort_collectives
from harness.distributed.failures import Failures, raise_lost_rank
from harness.errors import ConfigError, LostRank
from harness.run import run_in_world
from harness.testing.pool import RankError, RankPool
from tests.support.helpers import Pools, tiny_config

GLOO = "[/src/third_party/gloo/gloo/transport/tcp/pair.cc:553]"
ENFORCE = "[enforce fail at /src/third_party/gloo/gloo/transport/tcp/loop.cc:48]"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError(f"{GLOO} Connection closed by peer [::1]. This is typically..."), "[::1]: "),
        (RuntimeError("Application timeout caused pair closure"), "timeout caused pair closure: "),
        (DistStoreError("1/2 clients joined."), "rank: 1/2 clients joined: "),
        (RuntimeError(f"{ENFORCE} op.preamble.length <= op.nbytes. 8 vs 4"), "8 vs 4: "),
    ],
)
def test_errors_of_collectives_become_lost_rank(error: Exception, message: str) -> None:
    with pytest.raises(LostRank) as caught, raise_lost_rank(7):
        raise error
    assert message in str(caught.value) and "run.timeout_s = 7 s" in str(caught.value)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (RuntimeError(f"{ENFORCE} rv != -1. pipe: Too many open files"), "ulimit -n"),
        (DistNetworkError("failed to bind. name: EMFILE, message: too many open files"), "ulimit"),
        (DistStoreError("Failed to init uv loop"), "ulimit -n"),
        (DistNetworkError("failed to bind. port: 1, name: EADDRINUSE"), "--master_port"),
        (RuntimeError(f"{GLOO} bind: Address already in use"), "--master_port"),
    ],
)
def test_a_cause_on_this_machine_is_no_lost_rank(
    monkeypatch: pytest.MonkeyPatch, error: Exception, remedy: str
) -> None:
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(ConfigError, match=remedy), raise_lost_rank(7):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes differ"),
        RuntimeError("my own pair closure problem"),
        RuntimeError("see gloo/transport/tcp/pair.cc:553"),
        OSError(24, "Too many open files", "data.bin"),
    ],
)
def test_what_the_task_raises_stays_as_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, raise_lost_rank(7):
        raise error
    assert caught.value is error


@contextmanager
def hurry() -> Iterator[None]:
    """Ranks look for failures often."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.distributed.failures.SECONDS_BETWEEN_LOOKS", 0.1)
        patch.setattr("harness.distributed.failures.SECONDS_TO_NOTICE", 0.2)
        yield


def file() -> int:
    """What this rank is doing: the step is 5 more than the rank."""
    descriptor = os.memfd_create("doing")
    os.write(descriptor, bytes([5 + distributed.global_rank()]))
    return descriptor


def read(descriptor: int) -> tuple[int, str]:
    return os.pread(descriptor, 1, 0)[0], "data"


def wait_for_others(how: str) -> dict[str, Any]:
    """What the last rank does while the others wait for it in a collective, and what they raise."""
    last = distributed.world_size() - 1
    try:
        with hurry(), Failures(30, file(), read) as failures, raise_lost_rank(30):
            if distributed.global_rank() == last:
                if how == "ends":
                    os._exit(7)
                failures.tell("ValueError: unwell", 8, "forward")
                # It does not end, as in a collective of NCCL: its peers must not wait for that.
                time.sleep(2)
            else:
                distributed.barrier()
    except LostRank as error:
        place = [error.rank, error.host == socket.gethostname(), error.step, error.phase]
        return {"error": str(error), "place": place}
    return {}


def test_peers_of_a_rank_that_fails_leave_their_collectives(three_ranks: RankPool) -> None:
    """Within seconds: the pool's collectives would time out when the pool does."""
    *others, last = three_ranks.run(wait_for_others, "tells")
    here = socket.gethostname()
    for found in others:
        assert found["place"] == [2, True, 8, "forward"]
        expected = f"rank 2 on {here} has failed in step 8, phase forward: ValueError: unwell."
        assert found["error"].startswith(expected)
    assert last == {}
    three_ranks.close()  # whose collectives are aborted


def write_what_others_raise(directory: Path) -> None:
    found = wait_for_others("ends")
    (directory / str(distributed.global_rank())).write_text(json.dumps(found))


def test_a_rank_that_dies_is_named(three_ranks: RankPool, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="rank 2: died with exit code 7"):
        three_ranks.run(write_what_others_raise, tmp_path)
    for rank in range(2):
        found = json.loads((tmp_path / str(rank)).read_text())
        assert found["place"] == [2, True, 7, "data"]
        expected = f"rank 2 on {socket.gethostname()}, which was in step 7, phase data: "
        assert expected in found["error"]
        assert "its process was killed" in found["error"]


def write_what_others_raise_afar(directory: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.distributed.peers.Place.is_near", False)
        patch.setattr("harness.distributed.failures.SECONDS_TO_ANSWER", 1.5)
        write_what_others_raise(directory)


def test_a_rank_that_dies_on_another_node_is_named(three_ranks: RankPool, tmp_path: Path) -> None:
    """Also by rank 1, which exchanges messages with rank 0 only, and whom rank 0 must not name."""
    with pytest.raises(RankError, match="rank 2: died with exit code 7"):
        three_ranks.run(write_what_others_raise_afar, tmp_path)
    for rank in range(2):
        found = json.loads((tmp_path / str(rank)).read_text())
        assert found["place"] == [2, True, None, None], found
        assert f" has lost rank 2 on {socket.gethostname()}: " in found["error"]


def abort_what_waits() -> str:
    """The collective of rank 0, for which nobody else comes, is aborted by another thread."""
    group = dist.new_group(backend="gloo")
    dist.all_reduce(torch.ones(1), group=distributed.control_group())
    if distributed.global_rank() == 1:
        time.sleep(1)
        return ""
    threading.Timer(0.1, abort_collectives).start()
    try:
        distributed.barrier()
    except RuntimeError as error:
        return str(error)
    finally:
        del group
    return "not aborted"


def test_a_collective_is_aborted_from_another_thread() -> None:
    with RankPool(2) as pool:
        assert "gloo/transport" in pool.run(abort_what_waits)[0]


def leave_one_by_one() -> str:
    with hurry(), Failures(30):
        if distributed.global_rank() == 1:
            time.sleep(0.5)  # longer than the others wait after a failure
    distributed.barrier()
    return "left"


def test_ranks_that_end_in_order_are_not_lost(two_ranks: RankPool) -> None:
    assert two_ranks.run(leave_one_by_one) == ["left"] * 2


def test_a_process_alone_needs_no_peers(pools: Pools, tmp_path: Path) -> None:
    assert pools(1).run(run_in_world, tiny_config(tmp_path, run={"steps": 1})) == [0]
