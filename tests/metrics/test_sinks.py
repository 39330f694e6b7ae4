"""Files of metrics."""

import json
from pathlib import Path

import pytest

from harness.errors import RunDirectoryGone
from harness.metrics.sinks import JsonlSink


def test_a_run_resumes_over_lines_that_are_not_records(tmp_path: Path) -> None:
    """As a disk that was full, or broke, may leave them."""
    path = tmp_path / "metrics.jsonl"
    records = [json.dumps({"step": step, "loss": 1.0}).encode() for step in (1, 2, 3)]
    path.write_bytes(b"\n".join([records[0], b"\xff\xfe\x00{", records[1], records[2], b'{"st']))
    sink = JsonlSink(path, 2)
    sink.write({"step": 3, "loss": 0.5})
    sink.close()
    steps = [(r["step"], r["loss"]) for r in map(json.loads, path.read_text().splitlines())]
    assert steps == [(1, 1.0), (2, 1.0), (3, 0.5)]


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_directory_that_is_deleted_or_moved_is_an_error(
    tmp_path: Path, is_replaced: bool
) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    sink = JsonlSink(directory / "metrics.jsonl", -1)
    sink.write({"step": 1})
    directory.rename(tmp_path / "elsewhere")
    if is_replaced:
        directory.mkdir()
    with pytest.raises(
        RunDirectoryGone, match=f"{directory}: this run's directory was deleted, mo"
    ):
        sink.write({"step": 2})
    sink.close()
