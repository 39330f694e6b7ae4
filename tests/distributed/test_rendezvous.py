"""A second run in the same processes does not read what the first one left in a store."""

from datetime import timedelta

import pytest
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import rendezvous

from harness.distributed.rendezvous import URL


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
