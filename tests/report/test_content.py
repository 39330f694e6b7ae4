"""What is read of a run directory, and what a report makes of it."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from harness.errors import HarnessError
from harness.report import run_files
from harness.report.content import content_of
from harness.report.marks import marks_of
from harness.report.run_files import RunFiles
from harness.report.summary import best_evaluation
from tests.support.imports import loaded_by
from tests.support.run_directories import records, write_run


@pytest.fixture
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """log.txt has local times."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "UTC")
        time.tzset()
        yield
    time.tzset()


def test_the_figures_of_a_run(tmp_path: Path) -> None:
    run = RunFiles(write_run(tmp_path / "a"))
    content = content_of([run])
    (summary,) = content["runs"]
    assert summary["state"] == "complete"
    assert summary["figures"]["Steps"] == "400 of 400"
    assert summary["figures"]["Best eval/loss"] == "0.6556 at step 400"
    assert summary["figures"]["Goodput"] == "95.0%"
    assert summary["figures"]["Speed"] == "5.12 k tokens/s"
    assert summary["figures"]["Skipped steps"] == "1"
    assert [(s["label"], pytest.approx(s["seconds"])) for s in summary["phases"]] == [
        ("data", 0.01),
        ("forward", 0.03),
        ("backward", 0.04),
        ("optimizer", 0.02),
    ]
    assert summary["slowest"] == [(0, 0.75, ""), (1, 0.25, "backward")]
    assert best_evaluation(run) == ("eval/loss", pytest.approx(5 / 9 + 0.1), 400)
    charts = {chart["name"]: chart for chart in content["charts"]}
    assert {"loss", "eval/loss", "lr", "grad_norm", "skipped", "tokens_per_s"} <= charts.keys()
    assert {"phases", "histogram", "step_time_s", "effective_rank"} <= charts.keys()
    of_all = {"host max": [2], "host min": [0.5]}
    for name, sizes in (("memory", {"host": [1]}), ("ranks_memory", of_all)):
        assert {curve["label"]: curve["y"] for curve in charts[name]["curves"]} == sizes
    loss = charts["loss"]["curves"][0]
    assert len(loss["x"]) == 399 and max(loss["y"]) == pytest.approx(4.902, abs=1e-3)
    json.dumps(content, allow_nan=False)


@pytest.mark.usefixtures("utc")
def test_what_happened_when(tmp_path: Path) -> None:
    marks = marks_of(RunFiles(write_run(tmp_path / "a")))
    found = [(mark.kind, mark.step, mark.text) for mark in marks if mark.kind != "evaluation"]
    assert found == [
        ("command", 100, "lr x0.5: lr 0.0005"),
        ("save", 200, "saved step-00000200"),
        ("fault", 250, "rank 1 on node1 has ended in step 250"),
        ("resume", 200, "resumed from step-00000200"),
        ("warning", 333, "step 333: the loss is not finite"),
        ("command", 180, "</script><b>nonsense: rejected: "),
        ("restart", 250, "restart 1 of 10: rank 1 on node1 is lost"),
        ("end", 400, "complete: all steps are taken"),
    ]


def test_several_runs_are_compared(tmp_path: Path) -> None:
    runs = [RunFiles(write_run(tmp_path / name, lr=lr)) for name, lr in (("a", 1e-3), ("b", 2e-3))]
    content = content_of(runs)
    assert content["differences"] == [("engines.net.optimizer.lr", ["0.001", "0.002"])]
    assert {c["run"] for c in content["charts"][0]["curves"]} == {0, 1}


def test_a_run_is_read_on_and_again_after_a_resume(tmp_path: Path) -> None:
    path = write_run(tmp_path / "a", steps=150, ended=False)
    run = RunFiles(path)
    metrics = path / "metrics.jsonl"
    lines = [json.dumps(record) + "\n" for record in records(151, 200)]
    with metrics.open("a") as file:
        file.write("".join(lines[:-1]) + lines[-1][:20])
    run.refresh()
    assert len(run.metrics.steps) == 200 and len(run.metrics.evaluations) == 1
    with metrics.open("a") as file:
        file.write(lines[-1][20:])
    run.refresh()
    assert (run.metrics.steps["step"] == np.arange(1, 201)).all()
    assert len(run.metrics.evaluations) == 2
    staged = path / "staged"
    staged.write_text("".join(json.dumps(record) + "\n" for record in records(1, 120)))
    staged.replace(metrics)  # as a resume from step 120 does
    run.refresh()
    assert run.metrics.steps["step"][-1] == 120
    assert content_of([run])["runs"][0]["state"] == "running"


@pytest.mark.parametrize("size", [1, 60, 1 << 22])
def test_lines_are_whole_wherever_a_block_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """And a line that is no JSON, or none that is read fast, costs no other one."""
    monkeypatch.setattr(run_files, "BYTES_AT_ONCE", size)
    lines = [
        '{"step": 1, "loss": "nan", "big": 12345678901234567890123}',
        '{"step": 2, "lo{"step": 3, "loss": 1}',
        '{"step": 4, "loss": Infinity, "text": "\\ud800", "list": [1, 2], "none": null}',
        "",
        '{"step": 5, "eval/loss": 0.1, "loss": 7}',
        '{"step": 6, "loss": 0.1, "ok": true}',
        '{"step": 7, "loss": 1',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    metrics = RunFiles(tmp_path).metrics
    steps, nan = metrics.steps, np.nan
    assert steps["step"].tolist() == [1, 4, 6]
    for name, expected in {
        "loss": [nan, np.inf, 0.1],
        "big": [12345678901234567890123.0, nan, nan],
        "text": [nan] * 3,
        "list": [nan] * 3,
        "none": [nan] * 3,
        "ok": [nan, nan, 1],
    }.items():
        assert np.array_equal(steps[name], expected, equal_nan=True), name
    assert metrics.evaluations["loss"].tolist() == [7]


def test_a_run_of_an_older_version_and_one_without_a_step(tmp_path: Path) -> None:
    path = write_run(tmp_path / "old")
    old = [{k: r[k] for k in ("step", "loss") if k in r} for r in records(1, 50)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in old) + "[1]\nnull\n")
    (path / "goodput.jsonl").unlink()
    content = content_of([RunFiles(path)])
    assert [chart["name"] for chart in content["charts"]] == ["loss"]
    assert content["runs"][0]["axes"] == {"time": None, "tokens": None}
    (path / "metrics.jsonl").unlink()
    assert content_of([RunFiles(path)])["charts"] == []


def test_a_run_without_evaluations_saves_and_warnings(tmp_path: Path) -> None:
    path = write_run(tmp_path / "short", steps=50)
    (path / "log.txt").unlink()
    (summary,) = content_of([RunFiles(path)])["runs"]
    assert {mark[2] for mark in summary["marks"]} == {"command", "restart", "end"}
    assert summary["marks_left_out"] == 0


def test_what_is_not_a_run_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="is not a run directory: expected config"):
        RunFiles(tmp_path)


def test_a_report_needs_no_torch() -> None:
    loaded = loaded_by(
        "import harness.report.build, sys; assert 'torch' not in sys.modules, 'torch'"
    )
    assert "harness.report.page" in loaded
