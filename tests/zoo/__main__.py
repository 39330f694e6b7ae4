"""Trains entries of the zoo in all their layouts, prints their table, and updates docs/zoo.md.

`python -m tests.zoo [ENTRY ...]`: by default all.
"""

import logging
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import cache
from pathlib import Path

from harness.testing.pool import RankPool
from tests.zoo import table
from tests.zoo.models import ZOO
from tests.zoo.runner import train

log = logging.getLogger("zoo")


def main(names: list[str]) -> int:
    """Returns the exit code: 1 if a run went wrong."""
    failed = False
    started = time.perf_counter()
    with ExitStack() as stack, tempfile.TemporaryDirectory() as directory:
        pools = cache(lambda ranks: stack.enter_context(RankPool(ranks)))
        log.info(table.HEAD)
        for entry in (ZOO[name] for name in names or ZOO):
            outcomes = train(pools, Path(directory), entry, entry.layouts())
            line = table.row(entry, outcomes)
            log.info(line)
            table.write({entry.name: line})
            for outcome in outcomes:
                if not outcome.is_ok:
                    failed = True
                    log.error("WRONG: %s", outcome)
    log.info("%.0f s", time.perf_counter() - started)
    return int(failed)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stdout)
    sys.exit(main(sys.argv[1:]))
