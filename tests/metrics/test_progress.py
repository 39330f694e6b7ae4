"""The progress bar on a terminal of 80 columns."""

import os
import pty
import re
import struct
import termios
from fcntl import ioctl

import pytest

from harness.metrics.progress import Progress


@pytest.mark.parametrize(
    ("record", "ends"),
    [
        (
            {"lr": 9.4e-4, "loss": 2.10312, "samples_per_s": 79.4, "tokens_per_s": 15_341.2},
            "loss 2.103, lr 0.00094, tokens/s 15,341",
        ),
        ({"loss": 2.1, "samples_per_s": 1234.5, "tokens_per_s": 0.0}, "loss 2.1, samples/s 1,234"),
        ({f"engine{n}/loss": 1.23456 for n in range(9)}, "engine0/loss 1.235, engine1/loss 1.235"),
    ],
)
def test_the_bar_fits_the_terminal_and_cuts_no_number(
    monkeypatch: pytest.MonkeyPatch, record: dict[str, float], ends: str
) -> None:
    master, slave = pty.openpty()
    ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(slave, "w") as terminal, os.fdopen(master, "rb", buffering=0) as screen:
        monkeypatch.setattr("sys.stderr", terminal)
        progress = Progress(0, 1000, shown=True)
        progress.show({"step": 450} | record)
        progress.close()
        terminal.write("end")
        terminal.flush()
        shown = b""
        while not shown.endswith(b"end"):
            shown += screen.read(1 << 16)
        last = re.split(r"[\r\n]+", shown.decode().removesuffix("end").rstrip())[-1]
    assert len(last) <= 80
    bar, _, numbers = last.partition("], ")
    assert numbers.rstrip() == ends
    assert bar.startswith(" 45%|") and bar.count("█") >= 2 and "| 450/1000 [" in bar
