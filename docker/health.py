"""Whether the run in this container is healthy: for HEALTHCHECK and Kubernetes' probes.

Exit code 0 once a rank in this container has begun, which has its run's log open; and, where rank 0
is one of them and takes commands, as long as it answers `status`. The caller limits the time.
"""

import sys
from contextlib import closing
from pathlib import Path

import psutil

from harness.control.client import connected, send_command
from harness.control.wire import SOCKET
from harness.errors import HarnessError


def main() -> int:
    """Checks the open files of this user's processes in this container."""
    opened: set[Path] = set()
    for process in psutil.process_iter():
        try:
            opened |= {Path(file.path) for file in process.open_files()}
        except psutil.Error:
            continue
    if not any(path.name == "log.txt" for path in opened):
        sys.stdout.write("no rank has begun\n")
        return 1
    runs = [path.parents[1] for path in opened if path.parts[-2:] == ("control", "lock")]
    try:
        return max((status_of(run) for run in runs if listens(run)), default=0)
    except HarnessError as error:
        sys.stdout.write(f"{error}\n")
        return 1


def status_of(run_dir: Path) -> int:
    """Asks a run for its status, and prints it. Raises NoAnswer."""
    with closing(connected(run_dir)) as client:
        return send_command(client, "status", as_json=False)


def listens(run_dir: Path) -> bool:
    """Whether the run takes commands: its config, or the file system, may not allow it."""
    return (run_dir / SOCKET).exists()


if __name__ == "__main__":
    sys.exit(main())
