"""State dicts and JSON come back as they went, and a failed write leaves the old file."""

import json
import math
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from harness.io import (
    JsonLines,
    json_line,
    json_read,
    json_write,
    load,
    save,
    truncate,
    write_atomically,
)

SUFFIXES = [".pt", ".pth", ".sft", ".safetensors"]


COMPLEX = torch.tensor([1 + 2j, 3 - 4j])


def state() -> dict[str, torch.Tensor]:
    weight = torch.arange(12.0).reshape(3, 4)
    return {
        "weight": weight,
        "tied": weight,
        "row": weight[1],
        "turned": weight.T,
        "complex": COMPLEX,
        "conjugate": COMPLEX.conj(),
        "empty": torch.empty(0, 3),
        "empty_too": torch.empty(0, 3),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "half": torch.randn(5).bfloat16(),
        "mask": torch.tensor([True, False]),
        "learnt": torch.nn.Parameter(torch.ones(2)),
    }


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_state_dict_comes_back(tmp_path: Path, suffix: str) -> None:
    path, saved = tmp_path / f"x{suffix}", state()
    save(saved, path)
    found = load(path)
    assert found.keys() == saved.keys()
    for name, tensor in saved.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert found["tied"].data_ptr() == found["weight"].data_ptr()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_an_sft_file_is_an_ordinary_one_with_ties_in_its_metadata(tmp_path: Path) -> None:
    path = tmp_path / "x.sft"
    save(state(), path)
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(state()) - {"tied"}
        assert file.metadata() == {"format": "pt", "tied": '{"tied": "weight"}'}
        assert torch.equal(file.get_tensor("turned"), state()["turned"])


@pytest.mark.parametrize("name", ["x.bin", "x"])
def test_an_unknown_format_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"expected one of \.pt"):
        save({}, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    torch.save(Code(), tmp_path / "x.pt")
    with pytest.raises(Exception, match="weights_only"):
        load(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    json_write({"old": 1}, path)

    def fail_half_way(staged: Path) -> None:
        staged.write_text("{")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail_half_way)
    assert json_read(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_json_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"x\.json is not JSON"):
        json_read(tmp_path / "x.json")


def test_a_json_line_cuts_floats_and_stays_json() -> None:
    line = json_line({"step": 3, "loss": 1 / 3, "bad": math.nan, "far": -math.inf}, digits=4)
    assert json.loads(line) == {"step": 3, "loss": 0.3333, "bad": "nan", "far": "-inf"}
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


def test_a_full_disk_loses_lines_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs can be mounted by root only")
    try:
        (tmp_path / "ballast").write_bytes(b"x" * 32_768)
        lines = JsonLines(tmp_path / "x.jsonl")
        for number in range(20):
            lines.write({"number": number, "text": "x" * 5000})
        (tmp_path / "ballast").unlink()
        lines.write({"number": 20})
        lines.close()
        *first, cut, last = (tmp_path / "x.jsonl").read_text().splitlines()
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
    assert [json.loads(line)["number"] for line in first] == list(range(len(first)))
    assert 1 < len(first) < 20 and not cut.endswith("}") and json.loads(last) == {"number": 20}
    (message,) = [record.getMessage() for record in caplog.records]
    assert "x.jsonl: records are lost: " in message and "No space left" in message
