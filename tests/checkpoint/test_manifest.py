"""A manifest is checked value by value; what another version may have written is not damaged."""

import json
from pathlib import Path
from typing import Any

import pytest

from harness.checkpoint.manifest import parse_manifest, read_manifest
from harness.errors import CheckpointError, UnreadableCheckpoint
from tests.checkpoint.test_retention import make


def changed(manifest: Any, key: str, value: Any) -> Any:
    """The manifest with another value of a dotted key; None removes it."""
    name, _, rest = key.partition(" ")
    if rest:
        return manifest | {name: changed(manifest[name], rest, value)}
    left = {n: v for n, v in manifest.items() if n != name}
    return left if value is None else left | {name: value}


ENGINE = {"zero_stage": 1, "dtype": "torch.float32", "optimizer": "none", "layout": ""}


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("step", "3", "step is '3', expected an integer"),
        ("step", 3.5, "step is 3.5, expected an integer"),
        ("step", True, "step is True, expected an integer"),
        ("step", None, "step is missing"),
        ("saved_at", "now", "saved_at is 'now', expected a number"),
        ("metrics", {"x": None}, ""),
        ("metrics", {"x": "y"}, "metrics.x is 'y', expected a number"),
        ("finite", 1, "finite is 1, expected true or false or null"),
        ("hosts", ["a", 3], "hosts.1 is 3, expected a string"),
        ("hosts", "a", "hosts is 'a', expected a list"),
        ("files", [], "files is [], expected an object"),
        ("files net/shard.pt size", None, "files.net/shard.pt.size is missing"),
        ("files net/shard.pt", 3, "files.net/shard.pt is 3, expected an object"),
        ("note", "\ud800", "surrogates not allowed"),
    ],
)
def test_a_damaged_value_is_named(tmp_path: Path, key: str, value: Any, reason: str) -> None:
    manifest = json.loads((make(tmp_path, 1) / "manifest.json").read_text())
    text = json.dumps(changed(manifest, key, value)).encode()
    with pytest.raises(CheckpointError) as caught:
        parse_manifest(text, "x")
    assert not isinstance(caught.value, UnreadableCheckpoint)
    assert str(caught.value).startswith("checkpoint x: manifest.json is damaged: ")
    assert reason in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[" * 100_000, b"9" * 5000, b"[]"])
def test_what_is_no_manifest_is_damaged(text: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"^checkpoint x: manifest\.json is damaged: \S"):
        parse_manifest(text, "x")


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("engines", {"net": ENGINE | {"new": 1}}, "has 'engines.net.new', which this version"),
        ("files net/shard.pt new", 1, "has 'files.net/shard.pt.new', which this version"),
        ("format", "4", "has format '4'"),
        ("format", [], r"has format \[\]"),
    ],
)
def test_what_a_newer_version_may_mean_cannot_be_judged(
    tmp_path: Path, key: str, value: Any, reason: str
) -> None:
    """Also if another value is not what this version expects."""
    manifest = json.loads((make(tmp_path, 1) / "manifest.json").read_text())
    text = json.dumps(changed(manifest, key, value) | {"step": "3"}).encode()
    with pytest.raises(UnreadableCheckpoint, match=reason):
        parse_manifest(text, "x")


def test_what_was_written_is_read(tmp_path: Path) -> None:
    manifest = read_manifest(make(tmp_path, 1, loss=2.0, pinned="a\U0001f600"))
    assert manifest.metrics == {"eval/loss": 2.0} and manifest.pinned == "a\U0001f600"
    assert manifest.files["net/shard.pt"].rank == 0 and manifest.versions["torch"]
