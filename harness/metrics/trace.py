"""Traces of torch's profiler over a few steps, one per rank."""

from pathlib import Path

from torch.profiler import profile

from harness import distributed
from harness.files import write_atomically


class Trace:
    """Records the next `steps` steps as Chrome traces, which Perfetto opens."""

    def __init__(self, step: int, steps: int):
        """`step`: the last completed step. Collective. Raises HarnessError on all ranks."""
        self._last = step + steps
        with distributed.raise_on_all_ranks("cannot trace"):
            self._profiler = profile()
            self._profiler.start()

    def is_over(self, step: int) -> bool:
        """Whether all of its steps are completed."""
        return step >= self._last

    def write(self, directory: Path) -> None:
        """Ends the recording, and writes `directory/rank-00000.json` and so on.

        Collective. Raises HarnessError on all ranks.
        """
        with distributed.raise_on_all_ranks(f"cannot write the trace {directory}"):
            self._profiler.stop()
            directory.mkdir(parents=True, exist_ok=True)
            path = directory / f"rank-{distributed.global_rank():05d}.json"
            export = self._profiler.export_chrome_trace
            write_atomically(path, lambda staged: export(str(staged)))
