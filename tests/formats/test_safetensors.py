"""The safetensors reader trusts nothing in a file; the writer follows the format."""

import json
import os
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from harness.errors import FormatError
from harness.formats import safetensors
from harness.formats.tensor_writer import TensorWriter
from harness.io import load, save
from tests.support.fuzz import fuzz, mutated


def file_of(header: Any, data: bytes = b"", size: int | None = None) -> bytes:
    """A safetensors file with that header (JSON, or text), and `size` as its length."""
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + data


def entry(start: int, end: int, dtype: Any = "U8", shape: Any = None) -> dict[str, Any]:
    shape = [end - start] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a file of weights, but empty"),
    "short": (b"\2\0\0", "fewer than 8 bytes"),
    "false length": (file_of({}, size=1 << 62), "but the file has only 2 more"),
    "header longer than the file": (
        file_of({}, size=3),
        "its header should have 3 bytes, but the file has only 2 more",
    ),
    "not JSON": (file_of("nothing"), "expected '{' at character 0"),
    "a list": (file_of([1]), "expected '{'"),
    "blanks in front": (file_of(" {}"), "expected '{'"),
    "not UTF-8": (b"\2" + bytes(7) + b"\xff\xfe", "codec can't decode"),
    "JSON and more": (file_of("{}{}"), "unexpected text after the JSON object"),
    "cut off": (file_of('{"a":'), "tensor 'a'"),
    "duplicate name": (
        file_of('{"a":%s,"a":%s}' % (2 * (json.dumps(entry(0, 1)),)), b"x"),
        "duplicate key 'a'",
    ),
    "duplicate field": (
        file_of('{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"),
        "expected dtype, shape and data_offsets",
    ),
    "duplicate metadata": (file_of('{"__metadata__":{"a":"1","a":"2"}}'), "duplicate key 'a'"),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}}), "expected a string"),
    "half a character": (file_of('{"\\ud800":%s}' % json.dumps(entry(0, 0))), "surrogates"),  # noqa: UP031
    "unknown field": (file_of({"a": entry(0, 1) | {"x": 1}}, b"x"), "expected dtype, shape"),
    "missing field": (file_of({"a": {"dtype": "U8"}}), "expected dtype, shape"),
    "unknown dtype": (file_of({"a": entry(0, 1, "U9")}, b"x"), "unknown dtype 'U9'"),
    "dtype that is not a string": (file_of({"a": entry(0, 1, [])}, b"x"), r"unknown dtype \[\]"),
    "negative size": (file_of({"a": entry(0, 1, shape=[-1, -1])}, b"x"), "list of sizes"),
    "sizes of another type": (file_of({"a": entry(0, 1, shape=[1.0])}, b"x"), "list of sizes"),
    "true is not a size": (file_of({"a": entry(0, 1, shape=[True])}, b"x"), "list of sizes"),
    "overflow": (file_of({"a": entry(0, 0, shape=[2**32, 2**32])}), "overflows"),
    "overflow beside 0": (file_of({"a": entry(0, 0, shape=[2**62, 2**62, 0])}), "overflows"),
    "many dimensions": (file_of({"a": entry(0, 1, shape=[1] * 65)}, b"x"), "65 dimensions"),
    "half a byte": (file_of({"a": entry(0, 1, "F4", [1])}, b"x"), "not a whole number of bytes"),
    "deep": (file_of('{"a":' + "[" * 3000), "tensor 'a'"),
    "deep metadata": (file_of('{"__metadata__":' + "[" * 100_000), "expected '{'"),
    "wrong size": (file_of({"a": entry(0, 2, shape=[1])}, b"xx"), "do not span its 1 bytes"),
    "reversed": (file_of({"a": entry(1, 0)}, b"x"), "list of sizes"),
    "overlap": (
        file_of({"a": entry(0, 2), "b": entry(1, 3)}, b"xxx"),
        "'b' overlaps tensor 'a'",
    ),
    "the same bytes": (file_of({"a": entry(0, 2), "b": entry(0, 2)}, b"xx"), "overlaps"),
    "hole": (file_of({"a": entry(0, 1), "b": entry(2, 3)}, b"xxx"), "'b' leaves a gap after"),
    "hole in front": (file_of({"a": entry(1, 2)}, b"xx"), "leaves a gap after the header"),
    "missing data": (file_of({"a": entry(0, 8)}, b"xxx"), "5 bytes are missing"),
    "further data": (file_of({"a": entry(0, 1)}, b"xxx"), "2 bytes after the last tensor"),
}


@pytest.mark.parametrize(("content", "complaint"), HOSTILE.values(), ids=list(HOSTILE))
def test_the_error_says_what_is_wrong(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "x.sft"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=complaint) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_header_of_more_than_100_mb_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.sft"
    with path.open("wb") as file:
        file.write((200_000_000).to_bytes(8, "little") + b"{}")
        file.truncate(300_000_000)
    with pytest.raises(FormatError, match="its header has 200000000 bytes, expected at most"):
        safetensors.read_header(path)


@pytest.mark.parametrize(
    "text",
    ['{"__metadata__":' + "[[]," * 1_000_000, '{"a":' + "[[]," * 1_000_000, "{" * 4_000_000],
)
def test_a_hostile_header_takes_little_more_memory_than_its_size(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.sft"
    path.write_bytes(file_of(text))
    tracemalloc.start()
    with pytest.raises(FormatError):
        safetensors.read_header(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * len(text)


def test_names_are_not_used_as_paths(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "x.sft"
    path.parent.mkdir()
    names = ["../up", "/etc/x", "", "a\nb", "\x1b[2J", "ä" * 200]
    save({name: torch.ones(1) for name in names}, path)
    assert list(load(path)) == names
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["sub", "x.sft"]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_pipe_or_directory_is_refused_at_once(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "x.sft")
    with pytest.raises(FormatError):
        load(tmp_path / "x.sft")
    with pytest.raises(FormatError, match="not a regular file"):
        safetensors.read_header(tmp_path / "x.sft")


def test_misaligned_tensors_of_other_programs_are_read(tmp_path: Path) -> None:
    header = {"a": entry(0, 1), "b": entry(1, 9, "F32", [2])}
    (tmp_path / "x.sft").write_bytes(file_of(header, b"\7" + np.array([1, 2], "f4").tobytes()))
    assert safetensors.read_header(tmp_path / "x.sft").tensors["b"].start % 4
    for lazy in (False, True):
        found = load(tmp_path / "x.sft", lazy=lazy)
        assert found["a"].tolist() == [7] and found["b"].tolist() == [1, 2]
        assert found["b"].data_ptr() % 4 == 0


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "x.sft"
    tensors = {"one": ("U8", (1,)), "ä": ("F64", (2, 1)), "none": ("F32", (0, 3)), "": ("I16", ())}

    def fill(writer: TensorWriter) -> None:
        writer.write("", np.int16(5).tobytes())
        writer.write("ä", bytes(8), offset=0)
        writer.write("ä", np.float64(2.5).tobytes(), offset=8)
        writer.write("one", b"\1")
        with pytest.raises(ValueError, match="2 bytes at offset 15 extend past its 16 bytes"):
            writer.write("ä", bytes(2), offset=15)

    safetensors.write(path, tensors, fill, {"format": "pt"})
    found = load_file(path)
    assert found["ä"].tolist() == [[0], [2.5]] and found["one"].item() == 1
    assert found[""].item() == 5 and found["none"].shape == (0, 3)
    header = safetensors.read_header(path)
    assert list(header.tensors) == list(tensors) and header.metadata == {"format": "pt"}
    assert header.tensors["ä"].start % 8 == header.tensors[""].start % 2 == 0
    assert min(e.start for e in header.tensors.values()) % safetensors.ALIGNMENT == 0


def test_a_full_disk_is_noticed_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.sft"
    path.write_text("old")
    full = os.statvfs_result((4096, 4096, 10, 0, 0, 10, 10, 10, 0, 255))
    monkeypatch.setattr(os, "fstatvfs", lambda _: full)
    with pytest.raises(OSError, match=r"No space left on device: \d+ bytes"):
        save({"a": torch.ones(3)}, path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def seeds(directory: Path) -> list[bytes]:
    """Files that a fuzzer can start from."""
    weight = torch.arange(12.0).reshape(3, 4)
    complex_ones = torch.ones(2, dtype=torch.complex128)
    trees = [
        {
            "a": weight,
            "tied": weight,
            "row": weight[1],
            "turned": weight.T,
            "b": torch.ones(2).half(),
        },
        [{"n": 3, 4: (1.5, None, b"x" * 2000)}, np.arange(6).reshape(2, 3), list(range(100))],
        OrderedDict(x={1, 2}, z=torch.zeros(3).expand(2, 3), c=complex_ones),
        {
            "s": torch.Size([2]),
            "d": torch.bfloat16,
            "f": [0.5] * 70,
            "p": torch.nn.Parameter(weight),
        },
        {
            "w": [weight.flatten()[:8], weight.flatten()[4:]],
            "np": np.float32(3),
            "cpu": bytearray(9),
        },
    ]
    contents = []
    for tree in trees:
        save(tree, directory / "seed.sft")
        contents.append((directory / "seed.sft").read_bytes())
    return contents


def damaged(content: bytes, random: Random) -> bytes:
    """The file with something changed: bytes anywhere, or a value of the header's JSON."""
    size = 8 + int.from_bytes(content[:8], "little")
    head, data = content[8:size], content[size:]
    if random.random() < 0.5:
        header = json.loads(head)
        node = json.loads(header["__metadata__"]["harness"])
        part = random.choice((header, node, node, node))
        replace_one(part, random)
        if part is node:
            header["__metadata__"]["harness"] = json.dumps(node)
        head = json.dumps(header).encode()
    elif data and random.random() < 0.1:
        data = mutated(data, random, [head])
    else:
        head = mutated(head, random, [head], WORDS)
    result = len(head).to_bytes(8, "little") + head + data
    if random.random() < 0.05:
        result = result[: random.randrange(len(result) + 1)]
    if random.random() < 0.05:
        result = random.randbytes(8) + result[8:]
    return result


def replace_one(tree: Any, random: Random) -> None:
    """Puts another value, or another part of the tree, somewhere in a JSON tree."""
    places: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                collect(node[key])

    collect(tree)
    node, key = random.choice(places)
    other, other_key = random.choice(places)
    copy = json.loads(json.dumps(other[other_key]))
    value = random.choice((copy, *VALUES))
    if isinstance(node, dict) and random.random() < 0.3:
        node[random.choice((str(other_key), *TAGS))] = node.pop(key)
    else:
        node[key] = value


VALUES: list[Any] = [None, True, -1, 0, 1, 3, 10**12, 2**63, 0.5, "", "a", "w.0", "<f4", "<U0"]
VALUES += [[], {}, [0], [1, 0], [2**40, 2**40], {"tensor": "a"}, {"bytes": "AA=="}, "__harness__.0"]
TAGS = ["tensor", "tuple", "items", "dict", "set", "ints_in", "text_in", "numpy", "scalar", "float"]
TAGS += ["int", "complex", "bytearray", "size", "device", "dtype", "view", "stride", "OrderedDict"]
WORDS = [
    word.encode()
    for word in (
        *"{}[]:,0123456789-.", '"', '\\"', "null", "true", "NaN", "1e999", "-1", "99999999999",
        '"dtype":', '"F32"', '"view":[0,[9,9],[0,0]],', "\\ud800", '\\"tuple\\":', '\\"int\\":',
        '\\"bytearray\\":', '\\"tensor\\":\\"a\\"', '\\"stride\\":[0,1]', "[[[[[[[[", "9" * 30,
    )
]  # fmt: skip


@pytest.mark.parametrize("count", [600, pytest.param(120_000, marks=pytest.mark.slow)])
@pytest.mark.timeout(1800)
def test_a_damaged_file_loads_or_is_refused(tmp_path: Path, count: int) -> None:
    """Whatever a file holds: a FormatError or a structure, and little memory."""
    files, path = seeds(tmp_path), tmp_path / "x.sft"

    def make(random: Random) -> bytes:
        return damaged(random.choice(files), random)

    loaded = fuzz(path, make, lambda number: load(path, lazy=bool(number % 2)), count)
    assert count / 100 < loaded < count / 2


def test_a_dtype_that_torch_lacks_is_listed_and_named(tmp_path: Path) -> None:
    (tmp_path / "x.sft").write_bytes(file_of({"a": entry(0, 3, "F6_E2M3", [4])}, b"xxx"))
    assert safetensors.read_header(tmp_path / "x.sft").tensors["a"].shape == (4,)
    with pytest.raises(FormatError, match=r"^[^:]+: 'a': its dtype F6_E2M3 .* torch does not have"):
        load(tmp_path / "x.sft")


def test_metadata_may_be_null(tmp_path: Path) -> None:
    """As the safetensors library reads it: no metadata."""
    header = b'{"__metadata__": null, "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}'
    (tmp_path / "x.sft").write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    found = safetensors.read_header(tmp_path / "x.sft")
    assert list(found.tensors) == ["a"] and found.metadata == {}
    (tmp_path / "x.sft").write_bytes(
        len(header).to_bytes(8, "little") + header.replace(b"null", b"nul ") + b"x"
    )
    with pytest.raises(FormatError, match="expected"):
        safetensors.read_header(tmp_path / "x.sft")
