"""Whether the run in this container lives: what HEALTHCHECK and Kubernetes' probes ask.

Exit code 0 once a rank here has begun, which holds its run's log open, and, where rank 0 is and
takes commands, as long as it answers `status`. The caller bounds how long it may take.
"""

import sys
from pathlib import Path

import psutil

from harness.control.client import tell
from harness.control.wire import SOCKET
from harness.errors import HarnessError


def main() -> int:
    """Looks at the processes of this container that this user may look into."""
    held: set[Path] = set()
    for process in psutil.process_iter():
        try:
            held |= {Path(file.path) for file in process.open_files()}
        except psutil.Error:
            continue
    if not any(path.name == "log.txt" for path in held):
        sys.stdout.write("no rank has begun\n")
        return 1
    led = [path.parents[1] for path in held if path.parts[-2:] == ("control", "lock")]
    try:
        return max((tell(run, "status", as_json=False) for run in led if listens(run)), default=0)
    except HarnessError as error:
        sys.stdout.write(f"{error}\n")
        return 1


def listens(run_dir: Path) -> bool:
    """Whether the run takes commands: its config, or the file system, may not allow it."""
    return (run_dir / SOCKET).exists()


if __name__ == "__main__":
    sys.exit(main())
