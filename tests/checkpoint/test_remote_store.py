"""A store of checkpoints, by itself: what appears, when, and what is told when it fails."""

import math
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.checkpoint import remote_store
from harness.checkpoint.files import FileEntry, Stopped
from harness.checkpoint.inspect import describe
from harness.checkpoint.manifest import Manifest
from harness.checkpoint.remote_store import CHUNK, Store, local_name, remote_name
from harness.convert.run_checkpoints import best_in, linked_in
from harness.errors import CheckpointError
from harness.io import save
from harness.remote_path import as_path

SIZE = 2 * CHUNK + 5


def never() -> bool:
    return False


FILES = {"net/x.pt": FileEntry(size=SIZE, digest="", rank=0)}


def manifest_of(step: int, files: dict[str, FileEntry], pinned: str | None = None) -> Manifest:
    """Saved `step` seconds after 1970 began."""
    fields: dict[str, Any] = {"hosts": ["a"], "config_digest": "", "engines": {}, "world_size": 1}
    return Manifest(step=step, files=files, saved_at=float(step), pinned=pinned, **fields)


def test_only_a_manifest_makes_a_checkpoint(url: str, tmp_path: Path) -> None:
    source = tmp_path / "x.pt"
    source.write_bytes(bytes(range(256)) * (SIZE // 256) + b"12345")
    store = Store(f"{url}/run")
    assert store.checkpoints() == {}
    names = []
    for step in (2, 3):
        manifest = manifest_of(step, FILES)
        name = remote_name(Path(f"step-{step:08d}-a.b"), manifest)
        assert local_name(name) == f"step-{step:08d}-a.b"
        assert not store.has(name, "net/x.pt", SIZE)
        store.upload(source, name, "net/x.pt", never)
        assert store.has(name, "net/x.pt", SIZE)
        assert not store.has(name, "net/x.pt", SIZE + 1)
        assert store.unfinished() == [name]
        assert list(store.checkpoints()) == names[::-1]
        store.write_manifest(name, manifest)
        names.append(name)
        assert store.unfinished() == []
    found = store.checkpoints()
    assert list(found) == names[::-1]
    assert found[names[0]] == manifest_of(2, FILES)
    store.download(names[0], "net/x.pt", tmp_path / "back.pt")
    assert (tmp_path / "back.pt").read_bytes() == source.read_bytes()
    store.remove(names[1])
    assert list(store.checkpoints()) == [names[0]]
    assert not store.has(names[1], "net/x.pt", SIZE)


def test_the_best_one_is_named(url: str) -> None:
    store, names = Store(f"{url}/run"), []
    for step in (1, 2):
        names.append(remote_name(Path(f"step-{step:08d}"), manifest_of(step, {})))
        store.write_manifest(names[-1], manifest_of(step, {}))
    store.name_best("")
    for name in (*names, names[1], "", names[0]):
        store.name_best(name)
        found = linked_in(as_path(f"{url}/run"))
        assert str(found or "") == (f"{url}/run/{name}" if name else "")
    assert set(store.checkpoints()) == set(names)
    store.remove(names[0])
    with pytest.raises(CheckpointError, match=r"run: no checkpoint is linked .* harness inspect"):
        best_in(as_path(f"{url}/run"))


def test_a_metric_that_is_nan_is_read_back(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}/run")
    manifest = replace(manifest_of(1, {}), metrics={"eval/loss": math.nan})
    store.write_manifest("step-00000001.1000", manifest)
    (found,) = store.checkpoints().values()
    assert found.fault == manifest.fault == "eval/loss: NaN"


@pytest.mark.parametrize("url", ["file", "s3"], indirect=True)  # memory: objects grow in place
def test_a_transfer_that_ends_early_leaves_nothing(url: str, tmp_path: Path) -> None:
    source = tmp_path / "x.pt"
    source.write_bytes(bytes(SIZE))
    store, stop = Store(url), threading.Event()
    with pytest.raises(Stopped):
        store.upload(source, "step-1.1", "x.pt", lambda: stop.is_set() or stop.set() or False)
    assert not store.has("step-1.1", "x.pt", SIZE)
    with pytest.raises(FileNotFoundError):
        store.upload(tmp_path / "gone.pt", "step-1.1", "x.pt", never)
    with pytest.raises(CheckpointError, match=r"step-1\.1/x\.pt: FileNotFoundError"):
        store.download("step-1.1", "x.pt", tmp_path / "back.pt")
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == ["x.pt"]
    assert not list(tmp_path.glob("**/.*.tmp"))


def test_a_missing_bucket_is_not_made(s3: str, tmp_path: Path) -> None:
    store = Store("s3://other/runs")
    (tmp_path / "x.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"s3://other/runs/step-1.1/x.pt: "):
        store.upload(tmp_path / "x.pt", "step-1.1", "x.pt", never)


def test_an_unknown_store_is_refused() -> None:
    with pytest.raises(CheckpointError, match="nope://a: Protocol not known: nope"):
        Store("nope://a")


def test_a_store_that_does_not_answer_is_named(
    s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(CheckpointError, match=r"s3://bucket/.*127.0.0.1:9"):
        Store(s3).checkpoints()


class Clock:
    """Time that passes where somebody sleeps."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.now = 0.0
        patch.setattr(remote_store, "time", self)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_limit_spreads_the_bytes_of_all_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uploads and downloads together, 1 MB a second."""
    source = tmp_path / "x.pt"
    source.write_bytes(bytes(SIZE))
    clock, store = Clock(monkeypatch), Store(f"memory://{tmp_path}", mb_per_s=1)
    store.upload(source, "step-1.1", "a.pt", never)
    assert clock.now == pytest.approx(2 * CHUNK / 1e6, abs=0.2)  # the last 5 bytes may go then
    store.upload(source, "step-1.1", "b.pt", never)
    store.download("step-1.1", "a.pt", tmp_path / "back.pt")
    assert clock.now == pytest.approx((2 * SIZE + 2 * CHUNK) / 1e6, abs=0.2)
    ends = clock.now + 3
    with pytest.raises(Stopped):
        store.upload(source, "step-1.1", "c.pt", lambda: clock.now > ends)
    assert clock.now < ends + 1
    free = Store(f"memory://{tmp_path}")
    before = clock.now
    free.upload(source, "step-1.1", "d.pt", never)
    assert clock.now == before


def test_inspect_reads_manifests_only(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}/store")
    content = tmp_path / "x.pt"
    content.write_bytes(bytes(5))
    files = {"net/x.pt": FileEntry(size=5, digest="", rank=0)}
    for step in (1, 2):
        manifest = manifest_of(step, files)
        name = remote_name(Path(f"step-{step:08d}"), manifest)
        store.upload(content, name, "net/x.pt", never)
        store.write_manifest(name, manifest)
    newest, older = store.checkpoints()
    lines = list(describe(store.url))
    assert [line for line in lines if "step-" in line] == [
        line for name in (newest, older) for line in describe(f"{store.url}/{name}")
        if "step-" in line
    ]  # fmt: skip
    assert lines[0].startswith(f"{store.url}/{newest}: step 2, 1 rank, saved ")
    assert sum(line.endswith("in total, sizes checked: complete") for line in lines) == 2
    (tmp_path / "store/net").mkdir()
    for file in ("net/mp_rank_00_model_states.pt", "x.sft"):  # weights are described as well
        save({"a": torch.ones(2)}, tmp_path / "store" / file)
    with pytest.raises(CheckpointError, match=r"file://.*/store/net: not a DeepSpeed checkpoint"):
        list(describe(f"file://{tmp_path}/store/net"))
    assert "a  F32" in "".join(describe(f"file://{tmp_path}/store/x.sft"))
    (tmp_path / "store" / newest / "net/x.pt").write_bytes(bytes(4))
    with pytest.raises(CheckpointError, match=f"incomplete in the store: {newest}"):
        list(describe(store.url))
    for url in (f"{store.url}/step-00000009.1", f"file://{tmp_path}/nothing"):
        with pytest.raises(CheckpointError, match="expected a checkpoint, or a run's; found there"):
            list(describe(url))
    with pytest.raises(CheckpointError, match="--verify reads files of a disk"):
        describe(store.url, verify=True)
