"""What a rank is doing, as it tells it and as another process sees it."""

import os
from collections.abc import Iterator

import pytest

from harness.health import phases
from harness.health.phases import CELLS, PHASES, Phase


class Clock:
    """A clock in the place of the monotonic one."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(phases, "monotonic", clock)
    phases.begin()
    yield clock
    monkeypatch.undo()
    phases.begin()


def spend(clock: Clock, *phases_and_seconds: tuple[Phase, float]) -> None:
    for phase, seconds in phases_and_seconds:
        phases.enter(phase)
        clock.now += seconds


def test_another_process_sees_what_this_one_does(clock: Clock) -> None:
    """It maps the same file."""
    assert phases.file is not None
    cells = phases.view_of(phases.file)
    assert str(phases.doing(cells)) == "step 0, phase start"
    phases.at_step(12)
    spend(clock, ("data", 3.0))
    seen = phases.doing(cells)
    assert (seen.phase, seen.step, seen.seconds, seen.count) == ("data", 12, 3.0, 1)
    phases.beat()
    assert (phases.doing(cells).seconds, phases.doing(cells).count) == (0.0, 2)


def test_a_forked_process_has_its_own(clock: Clock) -> None:
    """A data-loader worker must not move its rank."""
    before = phases.now()
    child = os.fork()
    if not child:
        phases.enter("save")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert phases.now() == before


def test_the_phase_of_an_error_stays(clock: Clock) -> None:
    phases.enter("step")
    with phases.during("save"):
        assert phases.now().phase == "save"
    assert phases.now().phase == "step"
    with pytest.raises(OSError), phases.during("save"):
        raise OSError
    assert phases.now().phase == "save"


def test_times_by_phase(clock: Clock) -> None:
    """The longest is that of later steps: in the first ones much is done once."""
    for seconds in (300.0, 40.0, 2.0, 3.0, 2.5):
        spend(clock, ("data", 1.0), ("forward", seconds))
    phases.enter("backward")
    cells, forward = phases.view_of(phases.file or 0), PHASES.index("forward")
    assert (cells[phases.LONGEST + forward], cells[phases.TIMES + forward]) == (3.0, 2)
    assert {phase: phases.longest(phase) for phase in PHASES if phases.longest(phase)} == {
        "data": 1.0,
        "forward": 3.0,
    }
    phases.begin()
    assert list(phases.view_of(phases.file or 0)) == [clock.now, *[0.0] * (CELLS - 1)]
    assert phases.longest("forward") == 0.0


def test_a_wait_of_one_rank_is_a_sign_of_life_and_does_not_count(clock: Clock) -> None:
    """By the count a rank is found that is behind the others."""
    phases.enter("end")
    before = phases.now().count
    clock.now += 40
    assert phases.now().seconds == 40
    phases.wait_on()
    assert (phases.now().seconds, phases.now().count) == (0, before)
