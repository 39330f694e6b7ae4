"""Activations in host memory: what bench.offload prints."""

import subprocess
import sys

from bench.gpu.section import ROOT, Section, run_section


def measure(section: Section) -> None:
    lengths = ["8192"] if section.quick else ["8192", "32768"]
    command = [sys.executable, "-m", "bench.offload", "--model", "1b", "--lengths", *lengths]
    command += ["--rounds", "2", *(["--longest", "0"] if section.quick else [])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    section.add("printed", lines)
    if done.returncode:
        section.add("error", done.stderr[-500:])


if __name__ == "__main__":
    run_section(measure)
