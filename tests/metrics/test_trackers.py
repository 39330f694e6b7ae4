"""The trackers themselves, read back from the files that they write."""

import json
import sqlite3
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from harness.metrics import tracker_sink, trackers
from harness.metrics.tracker_sink import TrackerSink
from harness.metrics.trackers import TRACKERS, TrackedRun


def crash_and_resume(name: str, directory: Path) -> None:
    """A run that ends after step 15, and one that goes on from 10 to 20."""
    for step, last in ((0, 15), (10, 20)):
        run = TrackedRun("project", "tiny", step, {"run": {"steps": 20}}, directory)
        sink = TrackerSink(name, TRACKERS[name](), run, sends_exports=True)
        for now in range(step + 1, last + 1):
            sink.write({"step": now, "time": 1000.0 + now, "loss": 1 / now})
        sink.write({"step": last, "time": 1100.0, "eval/loss": 0.5})
        export = directory / f"step-{last}"
        export.mkdir()
        (export / "net.sft").write_bytes(b"weights")
        sink.write({"step": last, "event": "export", "text": str(export)})
        sink.close()


def test_mlflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracking = pytest.importorskip("mlflow.tracking", reason="needs mlflow-skinny")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    crash_and_resume("mlflow", tmp_path)
    client = tracking.MlflowClient((tmp_path / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("project")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert sorted(runs) == ["tiny", "tiny-from-10"]
    for run, steps in ((runs["tiny"], range(1, 16)), (runs["tiny-from-10"], range(11, 21))):
        history = client.get_metric_history(run.info.run_id, "loss")
        assert {metric.step: metric.value for metric in history} == {s: 1 / s for s in steps}
        assert len(history) == len(steps)
        evaluations = client.get_metric_history(run.info.run_id, "eval/loss")
        assert [(metric.step, metric.value) for metric in evaluations] == [(steps[-1], 0.5)]
        assert run.data.params["run.steps"] == "20" and run.data.tags["group"] == "tiny"
        assert run.info.status == "FINISHED"
        files = {item.path for item in client.list_artifacts(run.info.run_id)}
        assert files == {"events.txt", f"step-{steps[-1]}"}
    assert "has not got" not in caplog.text


def test_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("wandb", reason="needs wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    crash_and_resume("wandb", tmp_path)
    runs = {}
    for file in tmp_path.glob("wandb/offline-run-*/*.wandb"):
        entries = wandb_records(file)
        (run,) = [entry.run for entry in entries if entry.HasField("run")][:1]
        runs[run.display_name] = (run.run_group, history_of(entries))
        assert b"net.sft" in file.read_bytes()  # in the artifact's manifest
    assert sorted(runs) == ["tiny", "tiny-from-10"]
    for name, steps in (("tiny", range(1, 16)), ("tiny-from-10", range(11, 21))):
        group, history = runs[name]
        assert group == "tiny"
        assert [int(row["step"]) for row in history if "loss" in row] == [*steps]
        assert [(row["step"], row["eval/loss"]) for row in history if "eval/loss" in row] == [
            (str(steps[-1]), "0.5")
        ]
        assert sum("event/export" in row for row in history) == 1
    assert "has not got" not in caplog.text


class WandbServer(BaseHTTPRequestHandler):
    """As much of W&B's server as a run needs, until it is down."""

    has_run = threading.Event()
    is_down = False
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        found: dict[str, Any] = {}
        if self.path == "/graphql":
            name = json.loads(body).get("variables", {}).get("name")
            entity = {"id": "e", "name": "me", "entity": "me", "flags": "{}", "organization": None}
            project = {"id": "p", "name": "project", "entity": entity}
            bucket = {"id": "r", "name": name, "project": project}
            bucket |= {"config": "{}", "displayName": "tiny", "historyLineCount": 0}
            found = {"viewer": entity, "entity": entity}
            found["upsertBucket"] = {"bucket": bucket, "inserted": True}
        answer = json.dumps({"data": found, "limits": {}}).encode()
        self.send_response(500 if self.is_down else 200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)
        if b"upsertBucket" in body:
            self.has_run.set()

    def log_message(self, format: str, *args: Any) -> None: ...


def test_a_server_of_wandb_that_goes_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wandb = pytest.importorskip("wandb", reason="needs wandb")
    wandb.teardown()  # a process keeps the settings of its first run
    monkeypatch.setattr(trackers, "SECONDS_TO_FINISH", 1.0)
    monkeypatch.setattr(tracker_sink, "SECONDS_BETWEEN_SENDS", 0.01)
    with ThreadingHTTPServer(("127.0.0.1", 0), WandbServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("WANDB_API_KEY", 40 * "a")
        monkeypatch.setenv("WANDB_MODE", "online")
        run = TrackedRun("project", "tiny", 0, {}, tmp_path)
        sink = TrackerSink("wandb", TRACKERS["wandb"](), run)
        assert WandbServer.has_run.wait(60)
        WandbServer.is_down = True
        for step in range(1, 11):
            sink.write({"step": step, "time": 1000.0 + step, "loss": 1 / step})
        sink.close()
        server.shutdown()
    (file,) = tmp_path.glob("wandb/run-*/*.wandb")
    assert caplog.text.count("TimeoutError") == 1
    assert f"`wandb sync --include-online {file.parent}` sends it" in caplog.text
    rows = history_of(wandb_records(file))
    assert [int(row["step"]) for row in rows] == [*range(1, 11)]  # all are on the disk


def test_trackio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="needs trackio")
    crash_and_resume("trackio", tmp_path)
    with closing(sqlite3.connect(tmp_path / "trackio/project.db")) as database:
        rows = database.execute(
            "select run_name, step, metrics from metrics order by id"
        ).fetchall()
        configs = dict(database.execute("select run_name, config from configs").fetchall())
        artifacts = database.execute(
            "select name, producer_run_name from artifacts join artifact_versions on "
            "artifacts.id = artifact_id"
        ).fetchall()
    names = {name.rpartition("-")[0]: name for name in configs}
    assert sorted(names) == ["tiny", "tiny-from-10"]
    for name, steps in (("tiny", range(1, 16)), ("tiny-from-10", range(11, 21))):
        logged = [(step, json.loads(text)) for run, step, text in rows if run == names[name]]
        assert [(s, m["loss"]) for s, m in logged if "loss" in m] == [(s, 1 / s) for s in steps]
        assert [(s, m["eval/loss"]) for s, m in logged if "eval/loss" in m] == [(steps[-1], 0.5)]
        assert [s for s, metrics in logged if "event/export" in metrics] == [steps[-1]]
        config = json.loads(configs[names[name]])
        assert (config["run"], config["_Group"]) == ({"steps": 20}, "tiny")
        assert (f"tiny-step-{steps[-1]}", names[name]) in artifacts
    assert "has not got" not in caplog.text


def wandb_records(file: Path) -> list[Any]:
    """The records in an offline run: a log of LevelDB's format after a header of 7 bytes."""
    messages = pytest.importorskip("wandb.proto.wandb_internal_pb2", reason="needs wandb")
    data, place, records, parts = file.read_bytes(), 7, [], b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # the rest of a block
            place += 32768 - place % 32768
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # all of a record, or its last part
            records.append(messages.Record.FromString(parts))
            parts = b""
    return records


def history_of(entries: list[Any]) -> list[dict[str, str]]:
    """What the records of an offline run have logged, as JSON by name."""
    return [
        {item.key or "/".join(item.nested_key): item.value_json for item in entry.history.item}
        for entry in entries
        if entry.HasField("history")
    ]
