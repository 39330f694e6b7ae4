"""Weights in several files, as Hugging Face stores them; and hostile index files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.errors import FormatError
from harness.formats import shard_index
from harness.io import load, save
from tests.support.structures import assert_same


def state() -> dict[str, Any]:
    weight = torch.arange(12.0).reshape(3, 4)
    return {"a": weight, "tied": weight, "row": weight[1], "b": torch.ones(100), "c": torch.ones(3)}


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("lazy", [False, True])
def test_from_one_file_to_many_and_back(tmp_path: Path, lazy: bool) -> None:
    save(state(), tmp_path / "x.sft")
    save(load(tmp_path / "x.sft", lazy=lazy), tmp_path / "many", shard_size=100)
    assert names_in(tmp_path / "many") == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]
    save(load(tmp_path / "many", lazy=lazy), tmp_path / "y.pt")
    assert_same(load(tmp_path / "y.pt"), state())
    assert_same(load(tmp_path / "many" / shard_index.INDEX), state())


def test_other_programs_find_every_weight_where_the_index_says(tmp_path: Path) -> None:
    saved = {"a": torch.ones(9), "b": torch.zeros(9), "c": torch.ones(1)}
    save(saved, tmp_path, shard_size=40)
    index = json.loads((tmp_path / shard_index.INDEX).read_text())
    assert index["metadata"] == {"total_size": 76}
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], saved[name])


def test_indices_of_other_programs_are_read(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file({"x": torch.ones(2)}, tmp_path / "blobs" / "1", {"format": "pt"})
    save_file({"y": torch.ones(3)}, tmp_path / "blobs" / "2", {"format": "pt"})
    for number in "12":  # links, as in Hugging Face's cache
        link = tmp_path / "snapshot" / f"model-{number}.safetensors"
        link.symlink_to(tmp_path / "blobs" / number)
    index = {"weight_map": {"y": "model-2.safetensors", "x": "model-1.safetensors"}}
    (tmp_path / "snapshot" / shard_index.INDEX).write_text(json.dumps(index))
    assert {n: t.tolist() for n, t in load(tmp_path / "snapshot").items()} == {
        "y": [1, 1, 1],
        "x": [1, 1],
    }


def test_a_directory_with_one_file_is_that_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="found: none"):
        load(tmp_path)
    save({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    assert load(tmp_path)["x"].tolist() == [1, 1]
    for name in ("a", "b"):
        (tmp_path / f"{name}.index.json").write_text("{}")
    with pytest.raises(FormatError, match=r"a\.index\.json, b\.index\.json, model\.safetensors$"):
        load(tmp_path)


def test_an_old_index_is_removed_before_its_files_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    save(state(), tmp_path, shard_size=100)
    monkeypatch.setattr(shard_index, "write_index", fail)
    with pytest.raises(OSError, match="No space"):
        save(state(), tmp_path, shard_size=100)
    with pytest.raises(FormatError, match="found: none"):
        load(tmp_path)


SHARD = "model-00001-of-00001.safetensors"
HOSTILE: dict[str, tuple[Any, str]] = {
    "path up": ({"weight_map": {"x": f"../{SHARD}"}}, "is not a plain file name"),
    "absolute path": ({"weight_map": {"x": "/etc/passwd"}}, "is not a plain file name"),
    "hidden path up": ({"weight_map": {"x": f"sub/../{SHARD}"}}, "is not a plain file name"),
    "parent": ({"weight_map": {"x": ".."}}, "is not a plain file name"),
    "nothing": ({"weight_map": {"x": ""}}, "is not a plain file name"),
    "zero byte": ({"weight_map": {"x": "a\0.safetensors"}}, "is not a plain file name"),
    "a pickle": ({"weight_map": {"x": "model.pt"}}, "is not a plain file name like"),
    "number": ({"weight_map": {"x": 3}}, "'x': expected the name of a file, found 3"),
    "missing shard": ({"weight_map": {"x": "other.safetensors"}}, "the shard .* is missing"),
    "directory": ({"weight_map": {"x": "dir.safetensors"}}, "the shard .* is missing"),
    "missing tensor": (
        {"weight_map": {"x": SHARD, "z": SHARD}},
        "missing: 'z', listed in model.safetensors.index.json",
    ),
    "further tensor": ({"weight_map": {"x": "two.safetensors"}}, "unexpected: 'y', not listed in"),
    "a shard of another run": (
        {"weight_map": dict.fromkeys("stuvw", SHARD)},
        "missing: 's', 't', 'u' and 2 more, listed",
    ),
    "no weight_map": ({"metadata": {}}, "expected"),
    "a list": ([], "expected"),
    "not JSON": ("{", "not an index of shards"),
    "duplicate": (
        '{"weight_map": {"x": "%s", "x": "%s"}}' % (SHARD, SHARD),  # noqa: UP031
        "duplicate key",
    ),
    "deep": ("[" * 100_000, "not an index of shards"),
    "metadata of another kind": ({"weight_map": {"x": SHARD}, "metadata": [1]}, "expected"),
    "the structure of another file": (
        {"weight_map": {"x": SHARD}, "metadata": {"harness": {"version": 1}}},
        "not an index|not JSON",
    ),
    "a structure without the tensor": (
        {"weight_map": {"x": SHARD}, "metadata": {"harness": '{"version":1,"tree":[]}'}},
        "does not name 'x'",
    ),
}


@pytest.mark.parametrize(("index", "complaint"), HOSTILE.values(), ids=list(HOSTILE))
def test_a_hostile_index_is_refused(tmp_path: Path, index: Any, complaint: str) -> None:
    directory = tmp_path / "model"
    (directory / "dir.safetensors").mkdir(parents=True)
    save_file({"x": torch.ones(2)}, directory / SHARD)
    save_file({"x": torch.ones(2)}, tmp_path / SHARD)
    save_file({"x": torch.ones(2), "y": torch.ones(2)}, directory / "two.safetensors")
    text = index if isinstance(index, str) else json.dumps(index)
    (directory / shard_index.INDEX).write_text(text)
    with pytest.raises(FormatError, match=complaint) as caught:
        load(directory)
    assert str(caught.value).startswith(str(directory))


def test_an_index_is_not_read_beyond_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save({"x": torch.ones(2)}, tmp_path, shard_size=100)
    monkeypatch.setattr(shard_index, "MAX_INDEX", 20)
    with pytest.raises(FormatError, match="longer than 20 bytes"):
        load(tmp_path)
