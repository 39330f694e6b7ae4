"""The entry point: `deepspeed launch/train.py --config FILE.toml [--section.key=value ...]`.

It runs as well under `torchrun`, `srun` and `mpirun`, and as plain `python launch/train.py` in one
process.
"""

import os
import sys
import time
from typing import NoReturn

from harness.config.command_line import parse_args
from harness.errors import HarnessError
from harness.launcher import environment, parent

SECONDS_FOR_THE_LEADER = 5.0


def main() -> None:
    """Reads the command line, trains, and turns the user's mistakes into one message."""
    parent.family()  # while it is whole
    try:
        environment.adopt()
        config = parse_args(sys.argv[1:])
    except HarnessError as error:
        if not is_leader():  # it has most likely found the same, and its launcher ends the others
            time.sleep(SECONDS_FOR_THE_LEADER)
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
    if is_leader():
        sys.stderr.write(f"error: {error}\n")
    elif error.agreed:
        time.sleep(SECONDS_FOR_THE_LEADER)
    else:
        sys.stderr.write(f"error on rank {os.environ['RANK']}: {error}\n")
    sys.exit(error.code)


def is_leader() -> bool:
    """Whether this is rank 0, also where the environment says nonsense."""
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    main()
