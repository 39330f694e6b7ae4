"""How `python -m bench.gpu` runs a section."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import smoke
from bench.gpu.__main__ import run
from bench.gpu.runs import Run
from bench.gpu.section import Section

SECTION = """
import json, subprocess, sys, tempfile, time
from pathlib import Path

directory = tempfile.mkdtemp()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
found = {"directory": directory, "child": child.pid}
Path(sys.argv[-1]).write_text(json.dumps(found))
time.sleep(float(sys.argv[1]))
"""


@pytest.fixture
def section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that leaves a directory and a process behind."""
    (tmp_path / "leaves_much.py").write_text(SECTION)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    return "leaves_much"


@pytest.mark.parametrize(("seconds", "ended"), [("0", "ok"), ("600", "ended at its limit of 2 s")])
def test_what_was_found_is_kept_and_nothing_else(section: str, seconds: str, ended: str) -> None:
    found = run([section, seconds], limit=2 if seconds == "600" else 60)
    assert found["ended"] == ended
    assert not Path(found["results"]["directory"]).exists()
    for _ in range(100):
        if not is_running(found["results"]["child"]):
            return
        time.sleep(0.05)
    raise AssertionError("a process of the section is still running")


def is_running(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_a_slow_run_hides_none_that_are_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the limit ends the section while the first run takes too long."""
    file = tmp_path / "results.json"

    def outcome_of(section: Section, scratch: Path, run: Run) -> str:
        end = time.monotonic() + 10
        while run.name == "adamw zero2 fp32" and time.monotonic() < end:
            if file.exists() and "muon zero2" in file.read_text():
                return "ok, after another"
            time.sleep(0.01)
        return "ok"

    monkeypatch.setattr(smoke, "outcome_of", outcome_of)
    section: Any = Section(file, quick=True, small=True)
    smoke.measure(section)
    assert "ok, after another" in file.read_text()
