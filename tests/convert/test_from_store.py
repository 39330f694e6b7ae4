"""`harness convert` and `init_from` of a URL: ranges of what is needed, as from a disk."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.core import url_to_fs

from harness import io, remote_path
from harness.checkpoint.init_weights import read_weights
from harness.checkpoint.manifest import read_manifest
from harness.checkpoint.remote_store import Store, remote_name
from harness.convert.convert import Options, convert
from harness.errors import CheckpointError, HarnessError, UnreadableCheckpoint
from harness.formats import zips
from harness.formats.zips import records
from harness.remote_path import RemotePath, as_path
from tests.checkpoint.test_before import BEFORE, RUNS
from tests.support.helpers import tiny_config

TENSORS, SIZE = 20, 1 << 18
PAGES = 4096  # of a store, where headers are read


on_each = pytest.mark.parametrize(
    "url",
    ["memory", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("file", "s3"))],
    indirect=True,
)


def never() -> bool:
    return False


def converted(source: Path | str, target: Path, **options: Any) -> list[str]:
    lines: list[str] = []
    path = as_path(source) if isinstance(source, str) else source
    convert(path, target, Options(**options), lines.append)
    return lines


@contextmanager
def counted(url: str) -> Iterator[Callable[[], int]]:
    """How many bytes a store has been asked for."""
    files, total = url_to_fs(url, use_listings_cache=False)[0], 0
    read = files.cat_file

    def cat_file(path: str, start: int, end: int) -> bytes:
        nonlocal total
        content = read(path, start=start, end=end)
        total += len(content)
        assert len(content) == end - start
        return content

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "cat_file", cat_file)
        for other in ("get", "get_file", "cat", "read_block"):
            patch.setattr(files, other, None)
        yield lambda: total


def put(source: Path, url: str) -> None:
    files, path = url_to_fs(url, use_listings_cache=False)
    files.makedirs(path.rpartition("/")[0], exist_ok=True)
    files.put_file(str(source), path)


def upload_run(run: Path, url: str) -> list[str]:
    """The checkpoints of a run in a store; their names."""
    store, names = Store(url), []
    for directory in sorted((run / "checkpoints").glob("step-*")):
        manifest = read_manifest(directory)
        names.append(remote_name(directory, manifest))
        for file in manifest.files:
            store.upload(directory / file, names[-1], file, never)
        store.write_manifest(names[-1], manifest)
    return names


def test_a_part_of_a_file_is_read_by_ranges(url: str, tmp_path: Path) -> None:
    tree = {f"block.{n}": torch.randn(SIZE // 4) for n in range(TENSORS)}
    torch.save({"model": tree, "rest": dict(tree)}, tmp_path / "x.pt")
    io.save(tree, tmp_path / "x.sft")
    for name, key in (("x.pt", "model"), ("x.sft", None)):
        put(tmp_path / name, f"{url}/{name}")
        with counted(url) as total:
            converted(f"{url}/{name}", tmp_path / "y.sft", include=(r"block\.1?1$",), key=key)
            headers = PAGES * (4 + len(records(tmp_path / name))) if key else 2 * PAGES
            assert 2 * SIZE < total() < 2 * SIZE + headers
        assert set(io.load(tmp_path / "y.sft")) == {"block.1", "block.11"}
        converted(f"{url}/{name}", tmp_path / "z.sft", key=key, verify=True)
        found = io.load(tmp_path / "z.sft")
        assert all(torch.equal(found[name], tensor) for name, tensor in tree.items())


@on_each
@pytest.mark.parametrize(("name", "what"), [(RUNS[0], "all"), (RUNS[1], "weights")])
def test_a_run_converts_as_from_the_disk(url: str, tmp_path: Path, name: str, what: str) -> None:
    """The newest checkpoint, a given one, and an engine's files."""
    (stored,) = upload_run(BEFORE / name, f"{url}/run")
    expected = (BEFORE / f"{name}.converted.sft").read_bytes()
    for number, place in enumerate(("run", f"run/{stored}", f"run/{stored}/net")):
        target = tmp_path / f"{number}.sft"
        lines = converted(f"{url}/{place}", target, what=what, verify=place == "run")
        assert (f"note: from {stored}/net" in lines) == (place == "run")
        assert target.read_bytes() == expected
    if what == "all":
        converted(f"{url}/run", tmp_path / "zero", to_zero=1, ranks=3)
        assert len(list((tmp_path / "zero/global_step4").glob("*optim_states.pt"))) == 3


def test_it_is_the_newest_complete_one(tmp_path: Path) -> None:
    url = f"memory://{tmp_path}/run"
    (good,) = upload_run(BEFORE / RUNS[0], url)
    files, path = url_to_fs(url)
    for name in ("step-00000009.9000000000000", "step-00000008-a.b.8000000000000"):
        files.cp(f"{path}/{good}", f"{path}/{name}", recursive=True)
    files.rm_file(f"{path}/step-00000009.9000000000000/manifest.json")  # its upload was killed
    manifest = json.loads(files.cat_file(f"{path}/{good}/manifest.json"))
    manifest["saved_at"] += 1
    newer = f"{path}/step-00000008-a.b.8000000000000"
    files.pipe_file(f"{newer}/manifest.json", json.dumps(manifest).encode())
    assert "note: from step-00000008-a.b.8000000000000/net" in "".join(
        converted(url, tmp_path / "x.sft")
    )
    file = f"{newer}/net/mp_rank_00_model_states.pt"
    files.pipe_file(file, files.cat_file(file)[:-1])
    lines = converted(url, tmp_path / "x.sft")
    assert lines[0].startswith(f"note: passed over: {url}/step-00000008-a.b.8000000000000/net/mp")
    assert "bytes, expected" in lines[0]
    assert lines[1] == f"note: from {good}/net"


def test_one_that_the_store_does_not_give_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its manifest, of which a store does not tell a time."""
    url = f"memory://{tmp_path}/run"
    (good,) = upload_run(BEFORE / RUNS[0], url)
    files, path = url_to_fs(url)
    newer = f"{path}/step-00000009.9000000000000"
    files.cp(f"{path}/{good}", newer, recursive=True)
    read = type(files).cat_file

    def cat_file(self: Any, path: str, **options: Any) -> bytes:
        if path == f"{newer}/manifest.json":
            raise OSError("503 slow down")
        return read(self, path, **options)

    monkeypatch.setattr(type(files), "cat_file", cat_file)
    with pytest.raises(UnreadableCheckpoint, match="503 slow down; it may be complete"):
        converted(url, tmp_path / "x.sft")
    assert not (tmp_path / "x.sft").exists()


@on_each
def test_what_is_not_there_is_said_before_any_work(url: str, tmp_path: Path) -> None:
    (name,) = upload_run(BEFORE / RUNS[1], f"{url}/run")
    files, path = url_to_fs(f"{url}/run", use_listings_cache=False)
    files.rm_file(f"{path}/{name}/manifest.json")
    for place, message in {
        "nothing": "no such file or directory",
        "run": "a checkpoint, or a run's, without manifest.json, which is written last",
        f"run/{name}": "a checkpoint, or a run's, without manifest.json, which is written last",
    }.items():
        with pytest.raises(CheckpointError, match=f"{url}/{place}: {message}"):
            converted(f"{url}/{place}", tmp_path / "x.sft")
        with pytest.raises(CheckpointError, match=f"{url}/{place}: {message}"):
            read_weights(as_path(f"{url}/{place}"), "net")
    with pytest.raises(HarnessError, match="writes to a disk, not to a store"):
        convert(tmp_path, as_path(f"{url}/x.sft"), Options(), print)
    torch.save({"a": [torch.ones(2)]}, tmp_path / "tree.pt")
    put(tmp_path / "tree.pt", f"{url}/tree.pt")
    with pytest.raises(HarnessError, match="not a flat dict of tensors: download it first"):
        converted(f"{url}/tree.pt", tmp_path / "x.sft")
    assert not list(tmp_path.glob("*.sft"))


def test_a_store_that_refuses_is_named(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(OSError, match=rf"^{s3}/run: .*[Cc]redentials"):
        converted(f"{s3}/run", tmp_path / "x.sft")
    with pytest.raises(ValueError, match="nope://a: Protocol not known: nope"):
        as_path("nope://a")


def stored(directory: Path) -> tuple[Path, Any, str]:
    """A file of weights in a store: its path, the store's file system, and its path in that."""
    io.save({"a": torch.ones(10_000)}, directory / "x.sft")
    url = f"memory://{directory}/x.sft"
    put(directory / "x.sft", url)
    return as_path(url), *url_to_fs(url, use_listings_cache=False)


def test_a_server_without_ranges_is_refused(tmp_path: Path) -> None:
    """It sends all of the file."""
    source, files, path = stored(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        content = files.cat_file(path)
        patch.setattr(files, "cat_file", lambda *_, **__: content)
        with pytest.raises(HarnessError, match="its server sends no ranges: download it"):
            convert(source, tmp_path / "y.sft", Options(), print)


def test_nothing_is_looked_for_beside_a_file(tmp_path: Path) -> None:
    """A store answers 403, to whoever may not list it, for what is not there."""
    source, files, _ = stored(tmp_path)
    info = files.info

    def info_of_a_reader(path: str) -> Any:
        if not path.endswith("/x.sft"):
            raise PermissionError(path)
        return info(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "info", info_of_a_reader)
        assert list(read_weights(source, "net")) == ["a"]


def test_a_server_that_tells_no_size_is_refused(tmp_path: Path) -> None:
    source, files, path = stored(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        info = files.info(path) | {"size": None}
        patch.setattr(files, "info", lambda _: info)
        with pytest.raises(OSError, match="its server tells no size: download it"):
            read_weights(source, "net")


@pytest.mark.parametrize("path", ["h/f?sig=a//b", "h/a//b.sft", "h/./b"])
def test_a_url_that_no_path_holds_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="download it"):
        as_path(f"memory://{path}")
    for url in ("memory://h/f?sig=a", "memory:///a/b", "memory://h/a/"):
        assert str(as_path(url)) == url.rstrip("/")


def test_headers_of_many_records_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than a process keeps pages of."""
    torch.save({str(n): torch.zeros(1024) for n in range(100)}, tmp_path / "x.pt")
    url = f"memory://{tmp_path}/x.pt"
    put(tmp_path / "x.pt", url)
    monkeypatch.setattr(remote_path, "_fetch_small", lru_cache(16)(remote_path._fetch))
    monkeypatch.setattr(zips._Pages, "AT_A_TIME", 30, raising=False)
    with counted(url) as total:
        found = records(as_path(url))
        assert total() < PAGES * (len(found) + 8)
    assert [r._replace(path=Path()) for r in found.values()] == [
        r._replace(path=Path()) for r in records(tmp_path / "x.pt").values()
    ]


def test_the_config_takes_a_url(tmp_path: Path) -> None:
    engine: dict[str, Any] = {"init_from": "memory://b/run"}
    config = tiny_config(tmp_path, engines={"net": engine})
    again = type(config).model_validate(config.model_dump(mode="json"))
    assert isinstance(again.engines["net"].init_from, RemotePath)
    assert str(again.engines["net"].init_from) == "memory://b/run"
    with pytest.raises(ValueError, match="Protocol not known"):
        tiny_config(tmp_path, engines={"net": {"init_from": "nope://a"}})
