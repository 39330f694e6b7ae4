"""Standard input as a front."""

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.control.stdin import StdinFront
from harness.control.wire import MAX_LINE


class Desk:
    """Takes lines in place of a bus, and rejects those that begin with a question mark."""

    is_full = False

    def __init__(self) -> None:
        self.lines: list[str] = []

    def submit(self, text: str, *_: Any) -> bool:
        self.lines.append(text)
        return not text.startswith("?")


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A pipe in place of standard input: `(write, desk)`."""
    reading, writing = os.pipe()
    file = os.fdopen(reading)
    monkeypatch.setattr(sys, "stdin", file)
    desk: Any = Desk()
    front = StdinFront(desk)

    def write(data: bytes) -> None:
        os.write(writing, data)

    yield write, desk
    front.close()
    os.close(writing)
    until(lambda: not front_is_running())
    file.close()


def front_is_running() -> bool:
    return any(thread.name == "stdin" for thread in threading.enumerate())


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "not within 20 s"
        time.sleep(0.01)


def test_many_lines_at_once_all_arrive(stdin: Any) -> None:
    write, desk = stdin
    write(b"save\n\neval\r\nlr 1e-4\n")
    until(lambda: desk.lines == ["save", "eval", "lr 1e-4"])


def test_an_incomplete_line_waits_for_its_rest(stdin: Any) -> None:
    write, desk = stdin
    write(b"sa")
    time.sleep(0.3)
    assert desk.lines == []
    write(b"ve\nqu")
    until(lambda: desk.lines == ["save"])
    write(b"it\n")
    until(lambda: desk.lines == ["save", "quit"])


def test_invalid_utf8_and_a_very_long_line_are_harmless(stdin: Any) -> None:
    write, desk = stdin
    write(b"\xff\xfe\n")
    until(lambda: desk.lines == ["\ufffd\ufffd"])
    for _ in range(1024 * 1024 // 4096):  # 1 MB without a newline
        write(b"x" * 4096)
    assert MAX_LINE < 1024 * 1024
    write(b"quit\nsave\n")  # the end of that line, and then another
    until(lambda: desk.lines[-1] == "save")
    assert desk.lines == ["\ufffd\ufffd", "save"]


def test_it_waits_while_the_queue_is_full(stdin: Any) -> None:
    write, desk = stdin
    desk.is_full = True
    write(b"save\neval\n")
    time.sleep(0.3)
    assert desk.lines == []
    desk.is_full = False
    until(lambda: desk.lines == ["save", "eval"])


def test_a_flood_of_wrong_lines_is_slowed_down(stdin: Any) -> None:
    write, desk = stdin
    write(b"?\n" * 1000)
    time.sleep(0.5)
    assert 1 <= len(desk.lines) <= 100


@pytest.mark.parametrize("source", ["/dev/null", "closed", "none", "file"])
def test_the_front_ends_with_stdin(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str
) -> None:
    desk: Any = Desk()
    path = Path("/dev/null")
    if source == "file":
        path = tmp_path / "commands"
        path.write_text("save\nquit")
    with path.open() as file:
        if source == "closed":
            file.close()
        monkeypatch.setattr(sys, "stdin", None if source == "none" else file)
        StdinFront(desk)
        until(lambda: not front_is_running())
    assert desk.lines == (["save", "quit"] if source == "file" else [])
