"""Ranks agree and fail together; the pool that tests them reports failures."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from harness import distributed
from harness.errors import CheckpointError, HarnessError
from harness.testing.pool import RankError, RankPool


def reduce_ranks() -> list[int]:
    rank = distributed.global_rank()
    return distributed.all_reduce_max([rank, -rank, 7])


def leader() -> str | None:
    return distributed.global_leader_only(lambda: "leader")()


def fail_on(rank: int, kind: type[Exception]) -> tuple[str, str, int | None]:
    try:
        with distributed.raise_on_all_ranks("testing"):
            if rank in (distributed.global_rank(), -1):
                raise kind("broken shard")
    except HarnessError as error:
        return type(error).__name__, str(error), error.rank
    return "none", "", None


def exchange() -> tuple[str, list[int]]:
    rank = distributed.global_rank()
    return distributed.broadcast(f"from {rank}"), distributed.all_gather(rank * 10)


def draw(seed: int) -> float:
    distributed.seed_everything(seed + distributed.global_rank())
    return torch.rand(()).item()


def raise_on_one() -> None:
    if distributed.global_rank() == 1:
        raise ValueError("rank one is unwell")
    distributed.barrier()


def die_on_one() -> None:
    if distributed.global_rank() == 1:
        os._exit(7)
    distributed.barrier()


def hang_on_one() -> None:
    if distributed.global_rank() == 1:
        time.sleep(60)


def test_without_a_launcher_the_world_is_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    place = (distributed.global_rank(), distributed.local_rank(), distributed.world_size())
    assert place == (0, 0, 1)
    assert distributed.is_global_leader()
    assert distributed.local_world_size() == 1


def test_all_reduce_max_is_elementwise(three_ranks: RankPool) -> None:
    assert three_ranks.run(reduce_ranks) == [[2, 0, 7]] * 3


def test_leader_only_runs_on_the_leader(two_ranks: RankPool) -> None:
    assert two_ranks.run(leader) == ["leader", None]


def test_broadcast_and_all_gather(three_ranks: RankPool) -> None:
    assert three_ranks.run(exchange) == [("from 0", [0, 10, 20])] * 3


def test_ranks_are_seeded_apart_and_repeatably(two_ranks: RankPool) -> None:
    first = two_ranks.run(draw, 5)
    assert first[0] != first[1]
    assert two_ranks.run(draw, 5) == first


def test_a_failure_on_one_rank_is_raised_on_all(two_ranks: RankPool) -> None:
    expected = ("CheckpointError", "rank 1: broken shard", 1)
    assert two_ranks.run(fail_on, 1, CheckpointError) == [expected] * 2


def test_a_failure_on_all_ranks_names_none(two_ranks: RankPool) -> None:
    expected = ("CheckpointError", "broken shard", None)
    assert two_ranks.run(fail_on, -1, CheckpointError) == [expected] * 2


def test_an_unexpected_failure_keeps_its_traceback(two_ranks: RankPool) -> None:
    for kind, message, _ in two_ranks.run(fail_on, 0, KeyError):
        assert kind == "TaskError"
        assert "rank 0: testing" in message and "KeyError: 'broken shard'" in message
    assert two_ranks.run(fail_on, 9, KeyError) == [("none", "", None)] * 2


def test_the_pool_reports_what_a_rank_raised_and_recovers() -> None:
    with RankPool(2, timeout_s=30) as pool:
        with pytest.raises(RankError, match=r"rank 1: (.|\n)*rank one is unwell"):
            pool.run(raise_on_one)
        assert pool.run(reduce_ranks) == [[1, 0, 7]] * 2
        with pytest.raises(RankError, match="rank 1: died with exit code 7"):
            pool.run(die_on_one)


def test_the_pool_bounds_the_time_of_a_run() -> None:
    pool = RankPool(2, timeout_s=1)
    with pool, pytest.raises(RankError, match="rank 1: did not finish in time"):
        pool.run(hang_on_one)


UNCLOSED = """
from harness.distributed import global_rank
from harness.testing.pool import RankPool

if __name__ == "__main__":
    pool = RankPool(2)
    print(pool.run(global_rank))
"""


@pytest.mark.slow
def test_a_pool_that_is_never_closed_ends_with_the_process(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(UNCLOSED)
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[0, 1]\n"
