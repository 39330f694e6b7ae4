"""What rank 0 knows of the run at any moment, by a clock that the tests advance."""

import pytest

from harness.metrics.status import Status, format_duration


class Clock:
    """A clock in the place of `time`."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("harness.metrics.status.time.monotonic", clock.monotonic)
    return clock


def test_the_estimate_excludes_pauses_and_what_happens_in_them(clock: Clock) -> None:
    status = Status(0, 100)
    assert status.time_left() == "no step has been completed since the run started"
    clock.now += 2
    status.stepped(1)
    with status.doing("paused"):
        clock.now += 500
        with status.doing("evaluation"):
            clock.now += 70
    clock.now += 2
    status.stepped(2)
    assert status.time_left().startswith("3 min 16 s to step 100, at ")
    assert status.line() == "step 2 of 100, 3 min 16 s left, training"
    assert status.time_left(4).startswith("4 s to step 4, at ")
    assert status.time_left(4).endswith("(2 s per step)")
    assert status.time_left(1) == "step 1 has already passed: the run is at step 2"


def test_the_line_shows_the_activity_and_the_newest_numbers(clock: Clock) -> None:
    status = Status(3, 9)
    assert status.line() == "step 3 of 9, training"
    status.show({"step": 3, "G/loss": 0.123456, "lr": 1e-3, "grad_norm": 2.0, "tokens_per_s": 7})
    numbers = "G/loss 0.1235, lr 0.001, tokens_per_s 7"
    assert status.line() == f"step 3 of 9, training, {numbers}"
    with status.doing("save"):
        clock.now += 90
        since = "last step 1 min 30 s ago; phase save for 0 s"
        assert status.line() == f"step 3 of 9, saving ({since}), {numbers}"
    assert status.line() == f"step 3 of 9, training, {numbers}"  # a save is not counted


def test_the_line_shows_engines_that_are_not_trained_at_every_step() -> None:
    status = Status(0, 10)
    status.show({"step": 2, "D/loss": 1.0, "G/loss": 2.0, "G/lr": 0.1})
    status.show({"step": 3, "D/loss": 0.5})
    assert status.line().endswith(", D/loss 0.5, G/loss 2, G/lr 0.1")
    assert status.values()["record"] == {"step": 3, "D/loss": 0.5}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (367, "6 min 7 s"), (14_700, "4 h 5 min"), (183_600, "2 d 3 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
