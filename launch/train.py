"""The entry point: `deepspeed launch/train.py --config FILE.toml [--section.key=value ...]`.

It runs as well under `torchrun`, `srun` and `mpirun`, and as plain `python launch/train.py` in one
process.
"""

import os
import sys
import time
from typing import NoReturn

from harness import ranks
from harness.arguments import parse_args
from harness.control import launcher
from harness.errors import HarnessError

SECONDS_FOR_THE_LEADER = 5.0


def main() -> None:
    """Reads the command line, trains, and turns the user's mistakes into one message."""
    launcher.family()  # while it is whole
    try:
        ranks.adopt()
        config = parse_args(sys.argv[1:])
    except HarnessError as error:
        error.agreed = True  # every rank has read the same config
        leave(error)
    from harness.run import run  # late: a mistake in the config need not wait for torch

    try:
        sys.exit(run(config))
    except HarnessError as error:
        leave(error)
    except KeyboardInterrupt:  # before the run could hear of signals
        sys.exit(130)


def leave(error: HarnessError) -> NoReturn:
    """Says what is wrong: rank 0 for all if they agree, before the launcher ends the others."""
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        sys.stderr.write(f"error: {error}\n")
    elif error.agreed:
        time.sleep(SECONDS_FOR_THE_LEADER)
    else:
        sys.stderr.write(f"error on rank {rank}: {error}\n")
    sys.exit(error.code)


if __name__ == "__main__":
    main()
