"""Reading `.pt` files without torch, and hostile files that look like one."""

import io
import os
import pickle
import struct
import zipfile
from argparse import Namespace
from collections import OrderedDict, deque
from collections.abc import Callable
from datetime import date
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import nn

from harness.errors import FormatError
from harness.formats import pt_reader
from harness.formats.pickled import Global, Placeholder, UnsupportedTensor
from harness.formats.pt_reader import Device, DType, Shape, TensorRef
from tests.support.fuzz import fuzz, mutated


def values(ref: TensorRef) -> torch.Tensor:
    """A tensor from the bytes of its reference."""
    dtype = getattr(torch, ref.dtype)
    record = ref.storage.record
    if not record.size:
        return torch.empty(ref.shape, dtype=dtype)
    flat = torch.frombuffer(bytearray(record.read()), dtype=torch.uint8).view(dtype)
    return flat.as_strided(ref.shape, ref.stride, ref.offset)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of its elements, so that all dtypes can be compared."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def saved(tree: Any, directory: Path, **options: Any) -> Path:
    path = directory / "saved.pt"
    torch.save(tree, path, **options)
    return path


def test_every_tensor_is_found_at_its_place(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.randn(4, 3))
    marked = torch.arange(5.0)
    marked.ds_id = 3  # type: ignore[attr-defined]
    tree = {
        "parameter": weight,
        "tied": weight,
        "with attributes": marked,
        "transposed": torch.randn(3, 4).t()[1:],
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
        "expanded": torch.ones(1).expand(3),
        **{str(dtype): torch.ones(3).to(dtype) for dtype in DTYPES},
    }
    found = pt_reader.read(saved(tree, tmp_path))
    assert list(found) == list(tree)
    for name, tensor in tree.items():
        ref = found[name]
        assert ref.dtype == str(tensor.dtype).removeprefix("torch.")
        assert ref.shape == tensor.shape and ref.numel() == tensor.numel()
        assert ref.is_contiguous == tensor.is_contiguous() or not tensor.numel()
        assert raw(values(ref)).equal(raw(tensor)), name
    assert found["parameter"].storage is found["tied"].storage


DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int64,
    torch.uint16,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_come_back(tmp_path: Path, protocol: int) -> None:
    tree = {
        1: [None, True, 2**70, -3, 1.5, float("inf"), "ä\udc80"],
        "nested": {"tuple": (1, (2,)), ("a", 1): b"bytes", "set": {1, 2}, "j": 1 + 2j},
        "bytearray": bytearray(b"12"),
        "ordered": OrderedDict(a=1),
    }
    assert pt_reader.read(saved(tree, tmp_path, pickle_protocol=protocol)) == tree


def test_values_of_torch_have_stand_ins(tmp_path: Path) -> None:
    model = nn.BatchNorm1d(3).state_dict()  # has attributes
    tree = {"s": torch.Size([2, 3]), "d": torch.bfloat16, "on": torch.device("cpu"), "m": model}
    found = pt_reader.read(saved(tree, tmp_path))
    assert found["s"] == (2, 3) and isinstance(found["s"], Shape) and found["s"].numel() == 6
    assert found["d"] == DType("bfloat16")
    assert found["on"] == Device("cpu")
    assert list(found["m"]) == list(model)


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


def archive(path: Path, pickled: bytes, how: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", how) as file:
        file.writestr("x/data.pkl", pickled)
        file.writestr("x/data/0", bytes(16))
    return path


def laughs() -> bytes:
    """A list of ten lists of ten lists ..., all of them shared."""
    steps = (b"0]q%c(" % (n + 1) + (b"h%c" % n) * 10 + b"e" for n in range(30))
    return b"\x80\x02]q\x00" + b"".join(steps) + b"."


HASH_BOMB = b"\x80\x02}K\x01\x85" + b"q\x000h\x00h\x00\x86" * 40 + b"K\x01s."
STORAGE = (
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
)


def tensor_of(offset: int, size: int, stride: int) -> bytes:
    """The pickle of a tensor of one dimension on the four floats of `archive`."""
    numbers = (pickle.dumps(n, 2)[2:-1] for n in (offset, (size,), (stride,)))
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return b"\x80\x02" + rebuild + STORAGE + b"".join(numbers) + b"\x89}tR."


HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "extension": (lambda p: archive(p, b"\x80\x02\x82\x01."), "opcode"),
    "inst": (lambda p: archive(p, b"\x80\x02(ios\nsystem\n."), "opcode"),
    "bomb": (
        lambda p: archive(p, bytes(10**7), zipfile.ZIP_DEFLATED),
        "is compressed",
    ),
    "laughs": (lambda p: archive(p, laughs()), "more than"),
    "deep": (lambda p: archive(p, b"\x80\x02" + b"]" * 200_001 + b"a" * 200_000 + b"."), "deep"),
    "cycle": (lambda p: archive(p, b"\x80\x02]q\x00h\x00a."), "contains itself"),
    "hash": (lambda p: archive(p, HASH_BOMB), "unsupported key type"),
    "memo": (lambda p: archive(p, b"\x80\x02]r\xff\xff\xff\xffj\xff\xff\xff\xfe."), "malformed"),
    "size": (
        lambda p: archive(p, b"\x80\x02cbuiltins\nbytearray\nJ\x00\x00\x00\x70\x85R."),
        "malformed",
    ),
    "attributes": (
        lambda p: archive(p, b"\x80\x02ctorch\nSize\n}X\x04\x00\x00\x00makeK\x01sb."),
        "sets attributes of torch.Size",
    ),
    "a number called": (lambda p: archive(p, b"\x80\x02K\x01)R."), "a call of a int"),
    "a dtype called": (lambda p: archive(p, b"\x80\x02ctorch\nint8\n)R."), "a call of a DType"),
    "laughing keys": (
        lambda p: archive(p, b"\x80\x04(K\x01\x91" + b"q\x000(h\x00K\x01\x91" * 40 + b"."),
        "unsupported key type",
    ),
    "a slice as key": (
        lambda p: archive(p, b"\x80\x02}cbuiltins\nslice\nK\x01\x85RK\x01s."),
        "unsupported key type slice",
    ),
    "a long tuple as key": (
        lambda p: archive(p, b"\x80\x02}(" + b"N" * 1001 + b"tK\x01s."),
        "unsupported key type tuple",
    ),
    "a huge number as key": (
        lambda p: archive(p, b"\x80\x02}\x8b\x10\x27\x00\x00" + b"\x7f" * 10_000 + b"K\x01s."),
        "unsupported key type int",
    ),
    "a namespace of numbers": (
        lambda p: archive(p, b"\x80\x02cargparse\nNamespace\n)\x81}K\x01K\x02sb."),
        "the attributes of a namespace",
    ),
    "an array of no shape": (
        lambda p: archive(p, b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R(NNNNNtb."),
        "a numpy array",
    ),
    "out of range": (lambda p: archive(p, tensor_of(0, 5, 1)), "past the end of its data"),
    "far out": (lambda p: archive(p, tensor_of(2**61, 2, 2**61)), "past the end of its data"),
    "negative": (lambda p: archive(p, tensor_of(0, 2, -1)), "the shape of a tensor"),
    "empty": (lambda p: (p.write_bytes(b"") and p) or p, "but empty"),
    "text": (lambda p: (p.write_text("hello, " * 99) and p) or p, "not a zip archive"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make, message = HOSTILE[kind]
    with pytest.raises(FormatError, match=message) as caught:
        pt_reader.read(make(tmp_path / "hostile.pt"))
    assert str(tmp_path / "hostile.pt") in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hostile.pt"]


NOT_RUN: dict[str, tuple[bytes, str]] = {
    "a call": (pickle.dumps(Evil(), 2), "posix.system"),
    "a name": (b"\x80\x02cbuiltins\neval\n.", "builtins.eval"),
    "a name on the stack": (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "os.system"),
    "a class of torch": (b"\x80\x02ctorch\nTensor\n)R.", "torch.Tensor"),
    "an attribute": (b"\x80\x02cbuiltins\ngetattr\nca\nB\nX\x01\x00\x00\x00C\x86R.", "a.B.C"),
    "calls in calls": (b"\x80\x02" + b"cx\ny\n" * 99_999 + b")R" + b"\x85R" * 99_998 + b".", "x.y"),
    "what calls itself": (b"\x80\x02cx\ny\n)Rq\x00h\x00b.", "x.y"),
    "a setter": (b"\x80\x02cx\ny\n)Rq\x00cx\nset\nh\x00\x85R0.", "x.y"),
    "a plain class with odd arguments": (b"\x80\x02cbuiltins\nrange\nN\x85R.", "builtins.range"),
}


@pytest.mark.parametrize("kind", NOT_RUN)
def test_nothing_that_a_pickle_names_is_run(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pickled, name = NOT_RUN[kind]
    found = pt_reader.read(archive(tmp_path / "x.pt", pickled))
    assert isinstance(found, Placeholder | Global)
    assert (found.name if isinstance(found, Global) else found.class_name) == name
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.parametrize(
    ("kind", "called"),
    [
        ("DTensor", "the class DTensor: save it after full_tensor()"),
        ("Float8Tensor", "the class Float8Tensor, which wraps others"),
    ],
)
def test_a_tensor_that_wraps_others_is_named(tmp_path: Path, kind: str, called: str) -> None:
    """As FSDP2's shards and quantized weights."""
    pickled = f"ctorch._utils\n_rebuild_wrapper_subclass\nca.module\n{kind}\nN\x86R."
    found = pt_reader.read(archive(tmp_path / "x.pt", b"\x80\x02" + pickled.encode("latin1")))
    assert isinstance(found, UnsupportedTensor) and found.class_name == f"tensor of {called}"


def test_many_placeholders_are_hashed_quickly(tmp_path: Path) -> None:
    made = b"cx\ny\n)R"
    pickled = b"\x80\x04\x8f(" + made * 20_000 + b"\x90}" + (made + b"Ns") * 20_000 + b"\x86."
    keys, values = pt_reader.read(archive(tmp_path / "x.pt", pickled))
    assert len(keys) == len(values) == 20_000


def test_containers_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.formats.unpickler.MAX_CONTAINERS", 1000)
    for container in (b"]", b"}", b"\x8f", b")\x85", b"cx\ny\n"):
        with pytest.raises(FormatError, match="more than 1000 containers"):
            pt_reader.read(
                archive(tmp_path / "x.pt", b"\x80\x04]" + (container + b"a") * 1001 + b".")
            )
    pt_reader.read(archive(tmp_path / "x.pt", b"\x80\x04](" + b"N" * 100_000 + b"e."))


def test_a_tensor_that_ends_exactly_at_the_end_is_read(tmp_path: Path) -> None:
    ref = pt_reader.read(archive(tmp_path / "x.pt", tensor_of(1, 3, 1)))
    assert ref.shape == (3,) and values(ref).tolist() == [0, 0, 0]


def test_records_of_the_same_name_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as file, pytest.warns(UserWarning):
        file.writestr("x/data.pkl", b"\x80\x02N.")
        file.writestr("x/data.pkl", b"\x80\x02N.")
    with pytest.raises(FormatError, match="two records are named"):
        pt_reader.read(tmp_path / "x.pt")


def test_records_that_overlap_are_refused(tmp_path: Path) -> None:
    path = saved({"a": torch.ones(4), "b": torch.zeros(4)}, tmp_path)
    data = bytearray(path.read_bytes())
    first, second = (data.rindex(b"saved/data/%d" % n) - 4 for n in (0, 1))
    data[second : second + 4] = data[first : first + 4]  # the offset of its header
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"overlaps|damaged"):
        pt_reader.read(path)


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    path = saved({"a": torch.ones(400)}, tmp_path)
    storage = pt_reader.read(path)["a"].storage
    storage.record.verify()
    data = bytearray(path.read_bytes())
    data[storage.record.start + 77] ^= 4
    path.write_bytes(data)
    with pytest.raises(FormatError, match="wrong CRC of saved/data/0"):
        pt_reader.read(path)["a"].storage.record.verify()


def test_archives_above_4_gb_are_read(tmp_path: Path) -> None:
    """A sparse file: 5 GB of nothing before the first tensor."""
    path = tmp_path / "large.pt"
    with path.open("wb") as file, zipfile.ZipFile(file, "w") as zipped:
        zipped.writestr("x/data.pkl", tensor_of(1, 3, 1))
        zipped.start_dir = 5 << 30  # type: ignore[attr-defined]
        zipped.writestr("x/data/0", struct.pack("<4f", 1, 2, 3, 4))
    ref = pt_reader.read(path)
    assert ref.start > 5 << 30 and ref.nbytes == 12
    assert ref.storage.record.read() == struct.pack("<4f", 1, 2, 3, 4)


def seeds(**options: Any) -> list[bytes]:
    """Small files of every kind, to be damaged."""
    weight = nn.Parameter(torch.randn(3, 2))
    marked = torch.arange(5.0)
    marked.ds_id = 3  # type: ignore[attr-defined]
    trees: list[Any] = [
        {"w": weight, "tied": weight, "m": marked, "t": torch.randn(2, 2).t()},
        {"plain": [1, 2.5, None, True, b"x", "y", (1,), {2}], "s": torch.Size([2]), 3: 1j},
        {"n": Namespace(p=Path("a")), "d": deque([date(2024, 1, 2)]), "m": nn.Linear(1, 1)},
        OrderedDict(f8=torch.zeros(3, dtype=torch.float8_e4m3fn), d=torch.int8, e=torch.empty(0)),
    ]
    files = []
    for tree in trees:
        buffer = io.BytesIO()
        torch.save(tree, buffer, **options)
        files.append(buffer.getvalue())
    return files


@pytest.mark.parametrize("count", [500, pytest.param(120_000, marks=pytest.mark.slow)])
@pytest.mark.timeout(600)
def test_a_damaged_file_loads_or_is_refused(tmp_path: Path, count: int) -> None:
    path, files = tmp_path / "x.pt", seeds()

    def make(random: Random) -> bytes:
        """Most bytes are padding: the pickle and the directory are what is read."""
        content = random.choice(files)
        start = random.choice((0, 64, len(content) - 700))
        end = start + 700 if start else len(content)
        return content[:start] + mutated(content[start:end], random, files) + content[end:]

    def read(_: int) -> None:
        for ref in refs_in(pt_reader.read(path)):
            record = ref.storage.record
            assert record.start + record.size <= path.stat().st_size

    assert count / 10 < fuzz(path, make, read, count) < count / 2


@pytest.mark.parametrize("count", [250, pytest.param(40_000, marks=pytest.mark.slow)])
def test_a_damaged_file_of_old_torch_loads_or_is_refused(tmp_path: Path, count: int) -> None:
    path, files = tmp_path / "x.pt", seeds(_use_new_zipfile_serialization=False)

    def read(_: int) -> None:
        for ref in refs_in(pt_reader.read(path)):
            record = ref.storage.record
            assert record.start + record.size <= path.stat().st_size

    def make(random: Random) -> bytes:
        return mutated(random.choice(files), random, files)

    assert count / 20 < fuzz(path, make, read, count) < count / 2


def refs_in(tree: Any) -> list[TensorRef]:
    """The references to tensors in a tree."""
    match tree:
        case TensorRef():
            return [tree]
        case dict():
            return [ref for value in tree.values() for ref in refs_in(value)]
        case list() | tuple():
            return [ref for value in tree for ref in refs_in(value)]
    return []
