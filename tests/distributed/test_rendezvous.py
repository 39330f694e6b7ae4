"""A second run in the same processes does not read what the first one left in a store."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import pytest
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import rendezvous

from harness.distributed.rendezvous import URL, own_connection


def test_each_join_has_keys_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's agent has the store, for as long as the processes live."""
    timeout = timedelta(seconds=20)
    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(agent.port),
        "RANK": "1",
        "WORLD_SIZE": "2",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    first, rank, ranks = next(rendezvous(URL, timeout=timeout))
    second, _, _ = next(rendezvous(URL, timeout=timeout))
    assert (rank, ranks) == (1, 2)
    first.set("address", "of the first run")
    assert first.check(["address"]) and not second.check(["address"])


def test_a_call_that_waits_blocks_no_others() -> None:
    """Also of torch before 2.8, whose stores cannot be cloned."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    older = SimpleNamespace(_underlying_non_prefix_store=store)
    for number, other in enumerate((store, older)):
        waiting = own_connection(other)
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(waiting.get, f"key {number}")
            store.set(f"key {number}", "set meanwhile")
            assert found.result(20) == b"set meanwhile"
