"""The thread of the exchanges in the background."""

import socket
import threading

import pytest

from harness.distributed import background
from harness.distributed.forks import close_in_forks


def test_the_thread_ends_though_its_exchange_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that leaves while another one does not come to an exchange: woken by the end of that
    one as the interpreter ends, a thread within gloo aborted the process, with code -6."""

    def receive() -> None:
        waiting.recv(1)

    monkeypatch.setattr(background, "SECONDS_TO_END", 0.2)
    monkeypatch.setenv("MASTER_PORT", "1")
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as waiting,
        server.accept()[0],
    ):
        close_in_forks(waiting.fileno())
        thread = background._Thread()
        thread.submit(receive)
        monkeypatch.setattr(background, "_thread", thread)
        background.close()
        assert "exchanges" not in [thread.name for thread in threading.enumerate()]
