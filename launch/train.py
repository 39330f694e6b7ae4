"""The entry point: `deepspeed launch/train.py --config FILE.toml [--section.key=value ...]`.

`torchrun`, `srun` and `mpirun` launch it too, and plain `python launch/train.py` in one process.
"""

import os
import signal
import sys
import time
import traceback
from typing import NoReturn

from harness.config.command_line import parse_args
from harness.errors import ConfigError, HarnessError, is_on_all_ranks, with_notes
from harness.health.outcome import Outcome, forget_of_environment
from harness.launcher import environment, parent
from harness.launcher.leave import leave_after

LEADER_TIME_S = 5.0
"""Seconds that other ranks wait, so that rank 0 reports an error before the launcher kills it."""


def main() -> None:
    """Parses the command line and trains; an error that the user can fix is one message."""
    began = time.time()
    interrupt = signal.getsignal(signal.SIGINT)
    if interrupt is signal.default_int_handler:  # it is ignored in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback out of an import
    parent.parent_ids()  # while all launchers are alive
    try:
        environment.set_rank_variables()
        if os.environ.get("LOCAL_RANK", "0") == "0":
            forget_of_environment()
        config = parse_args(sys.argv[1:])
    except HarnessError as error:
        Outcome.of(error).write()
        if not is_leader():  # which most likely has the same error
            time.sleep(LEADER_TIME_S)
        exit_with(error)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no stacks of C++ when a rank is lost
    # Late: config errors are reported before torch is imported.
    if "--dry-run" in sys.argv:
        from harness.dry_run import dry_run as run
    else:
        from harness.run import run
    signal.signal(signal.SIGINT, interrupt)
    try:
        sys.exit(run(config, began=began, owns_process=True))
    except HarnessError as error:
        exit_with(error)
    except KeyboardInterrupt as error:  # before the run handles signals
        end = Outcome.of(error)
        end.write()
        sys.exit(end.code)
    except Exception as error:
        if not is_on_all_ranks(error) or is_leader():
            traceback.print_exc()
        else:
            time.sleep(LEADER_TIME_S)
        sys.exit(Outcome.of(error).code)


def exit_with(error: HarnessError) -> NoReturn:
    """Reports an error and exits with its code; if all ranks agree, only rank 0 reports it."""
    if is_leader():
        sys.stderr.write(f"error: {with_notes(error)}\n")
    elif error.on_all_ranks or isinstance(error, ConfigError):  # most likely of rank 0 as well
        time.sleep(LEADER_TIME_S)
    if not (is_leader() or error.on_all_ranks):
        sys.stderr.write(f"error on rank {os.environ['RANK']}: {with_notes(error)}\n")
    sys.exit(error.code)


def is_leader() -> bool:
    """Whether this is rank 0, also where RANK is not a number."""
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    leave_after(main)
