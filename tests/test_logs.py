"""The log of a rank: on its terminal and in the run's file."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.logs import configure_logging, log_to_file, set_deepspeed_level, set_log_level

log = logging.getLogger("harness.somewhere")

ranks = pytest.mark.parametrize("rank", ["0", "1"])


@pytest.fixture(autouse=True)
def logger() -> Iterator[None]:
    """Restores harness's logger after the test."""
    logger = logging.getLogger("harness")
    handlers, level, propagate = logger.handlers, logger.level, logger.propagate
    yield
    for handler in logger.handlers:
        handler.close()
    logger.handlers, logger.propagate = handlers, propagate
    logger.setLevel(level)


def lines_of(text: str) -> list[str]:
    """The lines of a log without their dates."""
    return [line.split(" ", 2)[2] for line in text.splitlines()]


@ranks
def test_a_rank_logs_to_its_terminal_and_to_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    configure_logging()
    configure_logging()  # as for a second run in the same process
    log.info("early")
    log.warning("early")
    log_to_file(tmp_path / "log.txt")
    log.debug("late")
    log.info("late")
    log.error("late")
    terminal, file = capsys.readouterr().err, (tmp_path / "log.txt").read_text()
    assert terminal == file
    expected = ["INFO early", "WARNING early", "INFO late", "ERROR late"]
    shown = expected if rank == "0" else expected[1::2]
    assert lines_of(file) == [f"rank {rank} {line}" for line in shown]


def test_a_full_disk_is_told_once(capfd: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    handler = log_to_file(Path("/dev/full"))
    for number in range(30):
        log.info("line %d", number)
    handler.close()
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 31 and "line 29" in lines[-1]
    assert [line for line in lines if "line" not in line.partition("INFO")[2]] == [
        "cannot write /dev/full: [Errno 28] No space left on device; it will lack lines"
    ]


@ranks
def test_the_level_of_other_ranks_is_at_least_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    configure_logging()
    log_to_file(tmp_path / "log.txt")
    for level in ("debug", "error"):
        set_log_level(level)
        log.debug("at %s", level)
        log.warning("at %s", level)
        log.error("at %s", level)
    expected = ["DEBUG at debug", "WARNING at debug", "ERROR at debug", "ERROR at error"]
    shown = expected if rank == "0" else expected[1:]
    assert lines_of((tmp_path / "log.txt").read_text()) == [f"rank {rank} {line}" for line in shown]


def test_what_deepspeed_logs() -> None:
    theirs, handler = logging.getLogger("DeepSpeed"), logging.NullHandler()
    level = theirs.level
    theirs.addHandler(handler)
    try:
        set_deepspeed_level("error")
        assert (theirs.level, handler.level) == (logging.ERROR, logging.ERROR)
    finally:
        theirs.removeHandler(handler)
        set_deepspeed_level(logging.getLevelName(level))
