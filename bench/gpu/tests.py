"""The tests marked gpu."""

import subprocess
import sys

from bench.gpu.section import ROOT, Section, run_section


def measure(section: Section) -> None:
    marker = "gpu" if section.is_on_gpu else "not gpu"
    files = ["tests"] if section.is_on_gpu else ["tests/test_devices.py"]  # to have any on a CPU
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-m", marker, *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    section.add("exit code", done.returncode)
    section.add("summary", lines[-1] if lines else done.stderr[-300:])
    section.add("failed", [line[:200] for line in lines if line.startswith(("FAILED", "ERROR"))])


if __name__ == "__main__":
    run_section(measure)
