"""A trace of some steps, by torch's profiler: every rank writes its own."""

from pathlib import Path

from torch.profiler import profile

from harness import distributed
from harness.checkpoint.manifest import step_directory
from harness.files import write_atomically


class Trace:
    """Records the next `steps` steps, and writes them as a Chrome trace.

    `directory/step-N/rank-00000.json`, N the last step: open it in Perfetto or chrome://tracing.
    """

    def __init__(self, directory: Path, step: int, steps: int):
        """`step`: the last one that was taken. Collective. Raises HarnessError on all ranks."""
        self._directory = directory
        self._last = step + steps
        with distributed.raise_on_all_ranks("cannot trace"):
            self._profiler = profile()
            self._profiler.start()

    def is_over(self, step: int) -> bool:
        """Whether all its steps have been taken."""
        return step >= self._last

    def write(self, step: int) -> Path:
        """Ends the recording and writes it. Collective. Raises HarnessError on all ranks."""
        target = step_directory(self._directory, step)
        with distributed.raise_on_all_ranks(f"cannot write the trace {target}"):
            self._profiler.stop()
            target.mkdir(parents=True, exist_ok=True)
            path = target / f"rank-{distributed.global_rank():05d}.json"
            export = self._profiler.export_chrome_trace
            write_atomically(path, lambda staged: export(str(staged)))
        return target
