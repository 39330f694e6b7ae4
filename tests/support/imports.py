"""Which modules of harness a piece of code loads, and whether it loads DeepSpeed."""

import subprocess
import sys

WATCHED = ("harness", "deepspeed", "transformers")


def loaded_by(code: str) -> set[str]:
    """The modules of harness, DeepSpeed and transformers in a new process that has run `code`."""
    code += "\nimport sys; print(*sys.modules, sep='\\n', file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {name for name in done.stderr.split() if name.partition(".")[0] in WATCHED}
