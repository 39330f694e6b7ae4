"""Commands: what a line means, how stdin is read, and that all ranks obey at the same step."""

import logging
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness.control.fronts import LONGEST_LINE, StdinFront

from harness import distributed
from harness.control.bus import Bus
from harness.control.commands import Command, Eval, Export, Quit, Save, SetLr, parse
from harness.errors import CommandError
from harness.run import train
from harness.testing.pool import RankPool
from tests.helpers import records, tiny_config


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("save", Save()),
        ("save as v1.0-rc", Save("v1.0-rc")),
        ("  export ", Export()),
        ("eval", Eval()),
        ("quit", Quit()),
        ("lr 1e-4", SetLr(1e-4)),
        ("lr 0", SetLr(0.0)),
    ],
)
def test_a_line_is_a_command(line: str, command: Command) -> None:
    assert parse(line) == command


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("sav", "did you mean 'save'"),
        ("save now", "save as NAME"),
        ("save as a/b", "save as NAME"),
        ("eval now", "eval takes no argument"),
        ("lr", "lr 1e-4"),
        ("lr foo", "lr 1e-4"),
        ("lr 1 2", "lr 1e-4"),
        ("lr nan", "finite"),
        ("lr -1", "not negative"),
        ("clear", "unknown command"),
        ("__import__('os')", "unknown command"),
    ],
)
def test_a_wrong_line_is_told_what_is_right(line: str, told: str) -> None:
    with pytest.raises(CommandError, match=told):
        parse(line)


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A pipe in the place of standard input: `(write, lines that the front submitted)`."""
    reading, writing = os.pipe()
    file = os.fdopen(reading)
    monkeypatch.setattr(sys, "stdin", file)
    lines: list[str] = []
    front = StdinFront(lines.append)

    def write(data: bytes) -> None:
        os.write(writing, data)

    yield write, lines
    front.close()
    os.close(writing)
    until(lambda: not front_is_running())
    file.close()


def front_is_running() -> bool:
    import threading

    return any(thread.name == "stdin" for thread in threading.enumerate())


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not come true within 10 s"
        time.sleep(0.01)


def test_many_lines_at_once_all_arrive(stdin: Any) -> None:
    write, lines = stdin
    write(b"save\n\neval\r\nlr 1e-4\n")
    until(lambda: lines == ["save", "eval", "lr 1e-4"])


def test_half_a_line_waits_for_the_rest(stdin: Any) -> None:
    write, lines = stdin
    write(b"sa")
    time.sleep(0.3)
    assert lines == []
    write(b"ve\nqu")
    until(lambda: lines == ["save"])
    write(b"it\n")
    until(lambda: lines == ["save", "quit"])


def test_invalid_utf8_and_an_endless_line_do_no_harm(stdin: Any) -> None:
    write, lines = stdin
    write(b"\xff\xfe\n")
    until(lambda: lines == ["\ufffd\ufffd"])
    for _ in range(1 + 2 * LONGEST_LINE // 4096):
        write(b"x" * 4096)
        time.sleep(0.002)
    write(b"quit\nsave\n")  # still that line, and then another
    until(lambda: lines[-1] == "save")
    assert "quit" not in lines


@pytest.mark.parametrize("source", ["/dev/null", "closed", "none", "file"])
def test_the_end_of_stdin_retires_the_front(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str
) -> None:
    lines: list[str] = []
    path = Path("/dev/null")
    if source == "file":
        path = tmp_path / "commands"
        path.write_text("save\nquit")
    with path.open() as file:
        if source == "closed":
            file.close()
        monkeypatch.setattr(sys, "stdin", None if source == "none" else file)
        StdinFront(lines.append)
        until(lambda: not front_is_running())
    assert lines == (["save", "quit"] if source == "file" else [])


def poll_often(lines: list[str], polls: int) -> list[list[Command]]:
    bus = Bus()
    found = []
    for number in range(polls):
        if distributed.is_global_leader() and number < len(lines):
            bus.submit(lines[number])
        found.append(bus.poll())
    bus.close()
    return found


def test_all_ranks_see_the_same_commands_at_the_same_poll(three_ranks: RankPool) -> None:
    lines = ["save", "nonsense", "lr 0.5", "eval", "lr x", "quit"]
    seen = three_ranks.run(poll_often, lines, 10)
    assert seen[0] == seen[1] == seen[2]
    assert [command for poll in seen[0] for command in poll] == [
        Save(),
        SetLr(0.5),
        Eval(),
        Quit(),
    ]


def commanded(config: Any, text: str) -> str:
    """A run whose rank 0 finds `text` on its standard input; returns the rank's log."""
    reading, writing = os.pipe()
    os.write(writing, text.encode())
    os.close(writing)
    kept, sys.stdin = sys.stdin, os.fdopen(reading)
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("harness").addHandler(handler)
    try:
        train(config)
    finally:
        sys.stdin = kept
        logging.getLogger("harness").removeHandler(handler)
    return "\n".join(messages)


def test_a_run_obeys_in_order_on_every_rank(two_ranks: RankPool, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, run={"steps": 5000}, control={"stdin": True})
    logs = two_ranks.run(commanded, config, "lr 1e-4\nlr bad\nsave\neval\nquit\n")
    orders = [re.findall(r"^step \d+: \w+\(.*$", log, re.MULTILINE) for log in logs]
    assert orders[0] == orders[1]
    kinds = ["SetLr(lr=0.0001)", "Save(name=None)", "Eval()", "Quit()"]
    assert [line.split(": ")[1] for line in orders[0]] == kinds
    assert "'lr bad': expected" in logs[0] and "lr bad" not in logs[1]
    last = records(config)[-1]["step"]
    assert last < 5000
    assert (config.run_dir / f"checkpoints/step-{last:08d}/manifest.json").exists()
    assert (config.run_dir / f"exports/step-{last:08d}/net.sft").exists()
    config = tiny_config(tmp_path, run={"steps": last + 3})
    two_ranks.run(train, config)
    assert [record["lr"] for record in records(config)][-3:] == [1e-4] * 3
