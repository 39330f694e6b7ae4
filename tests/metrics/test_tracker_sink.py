"""Trackers from the run's side: nothing that they do stops a step, or makes it wait."""

import logging
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from harness.health import phases
from harness.metrics import tracker_sink
from harness.metrics.tracker_sink import TrackerSink
from harness.metrics.trackers import TrackedRun
from harness.run import run_in_world
from tests.support.helpers import Pools, tiny_config

RUN = TrackedRun("project", "tiny", 0, {}, Path())


class Memory:
    """A tracker that keeps its runs, by name, and fails on demand."""

    def __init__(self, failing_opens: int = 0, failing: Sequence[str] = ()):
        self.runs: dict[str, list[float]] = {}
        self.events: list[tuple[int, str, str]] = []
        self.folders: list[Path] = []
        self.closed = 0
        self._failing_opens, self._failing = failing_opens, failing

    def open(self, run: TrackedRun) -> None:
        if self._failing_opens:
            self._failing_opens -= 1
            raise ConnectionError("no route to host")
        self._steps = self.runs.setdefault(run.name, [])

    def log(self, records: Sequence[Mapping[str, float]]) -> None:
        if "log" in self._failing:
            raise TimeoutError("the server is busy")
        self._steps += [record["step"] for record in records]

    def log_event(self, step: int, event: str, text: str) -> None:
        self.events.append((step, event, text))

    def log_folder(self, path: Path) -> None:
        self.folders.append(path)

    def close(self) -> None:
        self.closed += 1


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SENDS", "TRIES"):
        monkeypatch.setattr(tracker_sink, f"SECONDS_BETWEEN_{name}", 0.01)


def write_steps(sink: TrackerSink, first: int, last: int) -> None:
    for step in range(first, last + 1):
        sink.write({"step": step, "loss": 1.0, "note": "not a number"})


@pytest.mark.parametrize("sends_exports", [False, True])
def test_a_rollback_opens_a_new_run_and_each_step_stands_once_in_a_run(
    caplog: pytest.LogCaptureFixture, sends_exports: bool
) -> None:
    caplog.set_level(logging.INFO)
    tracker = Memory()
    sink = TrackerSink("memory", tracker, RUN, sends_exports)
    write_steps(sink, 1, 15)
    sink.write({"step": 15, "event": "export", "text": "exports/step-15"})
    sink.write({"step": 10, "event": "rollback", "text": "a spike"})
    write_steps(sink, 11, 20)
    sink.close()
    assert tracker.runs == {"tiny": [*range(1, 16)], "tiny-from-10": [*range(11, 21)]}
    assert [event for _, event, _ in tracker.events] == ["export", "rollback"]
    assert tracker.folders == ([Path("exports/step-15")] if sends_exports else [])
    assert tracker.closed == 2
    assert "from step 10 on they are in a new run, tiny-from-10, of the group tiny" in caplog.text


def test_what_is_written_before_a_tracker_can_be_opened_is_kept(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tracker = Memory(failing_opens=2)
    sink = TrackerSink("memory", tracker, RUN)
    write_steps(sink, 1, 5)
    while not tracker.runs:
        threading.Event().wait(0.01)
    sink.close()
    assert tracker.runs == {"tiny": [1, 2, 3, 4, 5]}
    assert caplog.text.count("memory: ConnectionError: no route to host") == 1
    assert "has not got" not in caplog.text


def test_a_tracker_that_fails_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    sink = TrackerSink("memory", Memory(failing=["log"]), RUN)
    for step in range(1, 4):
        write_steps(sink, step, step)
        sink.write({"step": step, "event": "save", "text": "a save"})
    sink.close()
    assert caplog.text.count("TimeoutError: the server is busy") == 1
    assert "memory has not got 3 records" in caplog.text


def test_a_tracker_that_hangs_costs_neither_memory_nor_the_end(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker_sink, "CAPACITY", 5)
    monkeypatch.setattr(tracker_sink, "SECONDS_TO_END", 0.05)
    tracker, released = Memory(), threading.Event()
    monkeypatch.setattr(tracker, "open", lambda run: released.wait())
    sink = TrackerSink("memory", tracker, RUN)
    write_steps(sink, 1, 12)
    began, beats = time.monotonic(), phases.now().count
    sink.close()
    assert phases.now().seconds < time.monotonic() - began, "the watchdog takes the end for a hang"
    assert phases.now().count == beats, "other ranks seem to be behind this one"
    assert caplog.text.count("it does not keep up, or does not answer") == 1
    assert "memory has not got 12 records" in caplog.text
    released.set()


def test_a_call_that_is_tried_again_for_long_is_told_of_while_the_run_goes_on(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker_sink, "SECONDS_TO_ANSWER", 0.0)
    tracker, called, released = Memory(), threading.Event(), threading.Event()

    def log(records: object) -> None:
        called.set()
        released.wait()
        raise RuntimeError("unauthorized")

    monkeypatch.setattr(tracker, "log", log)
    sink = TrackerSink("memory", tracker, RUN)
    write_steps(sink, 1, 1)
    called.wait()
    write_steps(sink, 2, 3)
    assert caplog.text.count("memory: it has not answered for 0 s. The run goes on") == 1
    released.set()
    sink.close()
    assert "memory: RuntimeError: unauthorized. The run goes on" in caplog.text


def test_files_take_as_long_as_they_need(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker_sink, "SECONDS_TO_ANSWER", 0.0)
    tracker, called, released = Memory(), threading.Event(), threading.Event()
    monkeypatch.setattr(tracker, "log_folder", lambda _: (called.set(), released.wait()))
    sink = TrackerSink("memory", tracker, RUN, sends_exports=True)
    sink.write({"step": 1, "event": "export", "text": "exports/step-00000001", "time": 0.0})
    called.wait()
    write_steps(sink, 2, 3)
    released.set()
    sink.close()
    assert not caplog.text


@pytest.mark.parametrize(("name", "package"), [("wandb", "wandb"), ("mlflow", "mlflow-skinny")])
def test_a_missing_library_is_refused_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=f"{name} is not installed: pip install {package} "):
        tiny_config(tmp_path, metrics={"trackers": [name]})


def run_with_stand_in(tmp_path: Path, module: Path) -> None:
    """A run of 2 steps, then one that resumes there, with a module in the place of trackio."""
    sys.path.insert(0, str(module))
    try:
        for steps in (2, 4):
            config = tiny_config(tmp_path, run={"steps": steps}, metrics={"trackers": ["trackio"]})
            run_in_world(config)
    finally:
        sys.path.remove(str(module))
        sys.modules.pop("trackio", None)


STAND_IN = """
from pathlib import Path

FILE = Path(__file__).with_name("calls.txt")

class Run:
    def log(self, metrics, step=None):
        with FILE.open("a") as file:
            print(step, sorted({"loss", "event/save"} & set(metrics)), file=file)

    def finish(self):
        pass

def init(project, name=None, group=None, config=None, embed=True, auto_log_gpu=None,
         auto_log_cpu=None):
    with FILE.open("a") as file:
        print(project, name.rpartition("-")[0], group, config["run"]["name"], file=file)
    return Run()
"""
"""What is used of trackio: its signatures as in its source at 2a027522."""


def test_a_run_reports_to_its_tracker_and_to_a_new_run_of_it_when_it_resumes(
    pools: Pools, tmp_path: Path
) -> None:
    module = tmp_path / "stand_in"
    module.mkdir()
    (module / "trackio.py").write_text(STAND_IN)
    pools(1).run(run_with_stand_in, tmp_path, module)
    lines = (module / "calls.txt").read_text().splitlines()
    runs = [number for number, line in enumerate(lines) if line.startswith("harness ")]
    assert [lines[number] for number in runs] == [
        "harness tiny tiny tiny",
        "harness tiny-from-2 tiny tiny",
    ]
    steps = [
        [int(line.split()[0]) for line in part if "loss" in line]
        for part in (lines[: runs[1]], lines[runs[1] :])
    ]
    assert steps == [[1, 2], [3, 4]]
    assert "2 ['event/save']" in lines and "4 ['event/save']" in lines
