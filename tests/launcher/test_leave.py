"""A process that leaves at once has done all that Python does at its end, except the tear-down."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import atexit, sys, tempfile, threading, time
from harness.launcher.leave import leave_after

class TornDown:
    def __del__(self):
        print("torn down")

kept, directory = TornDown(), tempfile.TemporaryDirectory()
open(sys.argv[1], "w").write(directory.name)

def main():
    atexit.register(print, "registered first")
    atexit.register(print, "registered last")
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
    threading.Thread(target=time.sleep, args=[60], daemon=True).start()
    print("main")
    {end}

leave_after(main)
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [("pass", 0), ("sys.exit()", 0), ("sys.exit(75)", 75), ("sys.exit('no')", 1), ("1 / 0", 1)],
)
def test_what_is_done_before_and_the_exit_code(tmp_path: Path, end: str, code: int) -> None:
    command = [sys.executable, "-c", CODE.replace("{end}", end), str(tmp_path / "x")]
    ended = subprocess.run(command, capture_output=True, text=True)  # stdout is a pipe: buffered
    lines = ended.stdout.splitlines()
    assert ended.returncode == code
    assert lines[:4] == ["main", "thread", "registered last", "registered first"]
    is_pythons_own = end in ("sys.exit('no')", "1 / 0")
    assert lines[4:] == ["torn down"] * is_pythons_own
    assert not Path((tmp_path / "x").read_text()).exists()
    assert ("no" in ended.stderr) == (end == "sys.exit('no')")
    assert ("ZeroDivisionError" in ended.stderr) == (end == "1 / 0")


WAITS = """
import atexit, multiprocessing, threading, time
from harness.launcher import leave

def work():
    time.sleep(1.5)

def main():
    {start}

leave.SECONDS_TO_A_WORD = 0.2
leave.leave_after(main)
"""


@pytest.mark.parametrize(
    ("start", "told"),
    [
        ("threading.Thread(target=work, name='reader').start()", "the thread 'reader', in work ("),
        (
            "multiprocessing.get_context('fork').Process(target=work, name='P').start()",
            r"the process \d+ \(P\): ",
        ),
        ("atexit.register(work)", "a function registered with atexit, in work ("),
        ("threading.Thread(target=work, daemon=True).start()", ""),
    ],
)
def test_what_keeps_it_from_its_end_is_told(start: str, told: str) -> None:
    command = [sys.executable, "-c", WAITS.replace("{start}", start)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0
    expected = told if "\\" in told else re.escape(told)
    assert bool(re.search(f"does not end: it waits for {expected}", ended.stderr)) == bool(told)
