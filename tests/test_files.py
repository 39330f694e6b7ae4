"""Files: atomic rename, JSON, JSON lines."""

import json
import math
from pathlib import Path

import pytest
import torch

from harness.files import JsonLines, json_line, json_write, truncate, write_atomically
from harness.io import save
from tests.support.helpers import small_disk


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    json_write({"old": 1}, path)

    def fail_half_way(staged: Path) -> None:
        staged.write_text("{")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail_half_way)
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_file_may_be_written_by_several_at_once(tmp_path: Path) -> None:
    """Threads of one process; and processes of several hosts, which may have the same number."""
    path = tmp_path / "x.txt"

    def overtaken(staged: Path) -> None:
        staged.write_text("first")
        write_atomically(path, lambda other: other.write_text("second"))
        assert path.read_text() == "second"

    write_atomically(path, overtaken)
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["x" * 255, "\u91cd" * 85])
def test_a_name_may_be_as_long_as_the_system_allows(tmp_path: Path, name: str) -> None:
    json_write(1, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_json_line_cuts_floats_and_stays_json() -> None:
    line = json_line({"step": 3, "loss": 1 / 3, "bad": math.nan, "far": -math.inf}, digits=4)
    assert json.loads(line) == {"step": 3, "loss": 0.3333, "bad": "nan", "far": "-inf"}
    assert json_line({"time": 1795904684.1234}) == '{"time": 1795904684.123}'
    assert truncate(123456.789, 3) == 123000.0
    assert truncate(True) is True and truncate(10**20) == 10**20


def test_lines_are_appended_after_one_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"a"')
    for number in (2, 3):
        lines = JsonLines(path)
        lines.write({"a": number})
        lines.close()
    assert path.read_text() == '{"a": 1}\n{"a"\n{"a": 2}\n{"a": 3}\n'


def test_a_full_disk_loses_lines_and_warns_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with small_disk(tmp_path, "64k"):
        (tmp_path / "ballast").write_bytes(b"x" * 32_768)
        lines = JsonLines(tmp_path / "x.jsonl")
        for number in range(20):
            lines.write({"number": number, "text": "x" * 5000})
        (tmp_path / "ballast").unlink()
        lines.write({"number": 20})
        lines.close()
        *first, cut, last = (tmp_path / "x.jsonl").read_text().splitlines()
    assert [json.loads(line)["number"] for line in first] == list(range(len(first)))
    assert 1 < len(first) < 20 and not cut.endswith("}") and json.loads(last) == {"number": 20}
    (message,) = [record.getMessage() for record in caplog.records]
    assert "x.jsonl: records are lost: " in message and "No space left" in message


def test_an_error_names_the_target_file(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k"), pytest.raises(OSError, match="No space") as error:
        save(torch.zeros(100_000), tmp_path / "disk/x.pt")
    assert error.value.filename == str(tmp_path / "disk/x.pt")
