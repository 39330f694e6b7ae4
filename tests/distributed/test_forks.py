"""A forked process keeps nothing that would hide the death of its rank."""

import multiprocessing
import os
import signal
import socket
import stat
import time
from pathlib import Path

import psutil
import pytest

from harness import distributed
from harness.distributed.forks import close_in_forks, end_with_parent, sockets_close_in_forks
from harness.testing.pool import RankError, RankPool
from tests.support.jobs import until

fork = multiprocessing.get_context("fork")


def dies_with_a_busy_worker() -> None:
    """Rank 1 is killed, while a process that it has forked is busy; rank 0 waits for it."""
    if distributed.global_rank() == 1:
        fork.Process(target=time.sleep, args=(15,)).start()
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.barrier()


def test_other_ranks_notice_the_death_of_a_rank_whose_worker_is_busy() -> None:
    """Within the seconds that the pool waits after a failure, not after the timeout."""
    with (
        RankPool(2) as pool,
        pytest.raises(RankError, match=r"rank 0: (.|\n)*(closed|reset) by peer"),
    ):
        pool.run(dies_with_a_busy_worker)


def test_a_descriptor_is_closed_in_forked_processes_only() -> None:
    with socket.socket() as ours, socket.socket() as other:
        close_in_forks(ours.fileno())
        child = os.fork()
        if not child:
            os._exit(_open(ours) + 2 * _open(other))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
        assert _open(ours)


def test_sockets_opened_in_the_context_are_closed_and_no_later_file_of_that_number() -> None:
    with sockets_close_in_forks():
        ours, closed = socket.socket(), socket.socket()
        number = closed.fileno()
        reading, _ = os.pipe()
    closed.close()
    os.dup2(reading, number)
    child = os.fork()
    if not child:
        os._exit(_open(ours) + 2 * bool(os.fstat(number)))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2


def _open(descriptor: socket.socket) -> bool:
    """Whether it is still a socket: the number may be another file's in a forked process."""
    try:
        return stat.S_ISSOCK(os.fstat(descriptor.fileno()).st_mode)
    except OSError:
        return False


def _worker(path: str) -> None:
    end_with_parent()
    Path(path).write_text(str(os.getpid()))
    time.sleep(60)


def _rank(path: str) -> None:
    fork.Process(target=_worker, args=(path,)).start()
    time.sleep(60)


def test_a_worker_ends_with_its_rank(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    rank = fork.Process(target=_rank, args=(str(path),))
    rank.start()
    until(lambda: path.exists() and bool(path.read_text()))
    worker = psutil.Process(int(path.read_text()))
    rank.kill()
    rank.join()
    until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)
