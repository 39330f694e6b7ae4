"""Where the ranks of a launcher meet, also for a second run in the same processes."""

import os
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from torch.distributed import (
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
    Store,  # pyright: ignore[reportPrivateImportUsage]
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]
)
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

URL = "harness://"
"""torch's "env://", except that each join of a process has keys of its own.

The store may outlive a run: torchrun's agent has it, or rank 0's process. A second run would read
there where the ranks of the first one listened, and wait for them.
"""

Address = tuple[str, str]

_joins: Counter[Address] = Counter()
_stores: dict[Address, Store] = {}
"""They stay open between runs: rank 0's would close while others already join again."""


def _join(url: str, timeout: timedelta, **_: Any) -> Iterator[tuple[Store, int, int]]:
    address = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    store, rank, ranks = next(rendezvous("env://", timeout=timeout))
    if ranks > 1:
        _stores[address] = store
    _joins[address] += 1
    yield PrefixStore(f"harness/joins/{_joins[address]}", store), rank, ranks


register_rendezvous_handler("harness", _join)


def own_connection(store: Any) -> Store:
    """The same store by a connection of its own: a call that waits would block others of the same
    connection. Before torch 2.8 its keys are without the prefixes of `store`'s."""
    if hasattr(store, "clone"):
        return store.clone()
    whole = getattr(store, "_underlying_non_prefix_store", store)
    if not isinstance(whole, TCPStore):  # those of files have no connection
        return whole
    own = TCPStore(whole.host, whole.port, is_master=False)
    own.set_timeout(whole.timeout)  # pyright: ignore[reportAttributeAccessIssue]
    return own
