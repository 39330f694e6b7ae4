"""Valid archives with invalid pickles: values, or a FormatError."""

import io
import pickle
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from harness.errors import FormatError
from harness.io import load, save
from tests.support.fuzz import fuzz, mutated
from tests.support.structures import assert_same


def archive(pickled: bytes, storages: Mapping[str, bytes] | None = None) -> bytes:
    """A `.pt` file with that pickle, every CRC right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("x/data.pkl", pickled)
        file.writestr("x/byteorder", b"little")
        for name, content in (storages or {}).items():
            file.writestr(f"x/data/{name}", content)
    return buffer.getvalue()


def test_numpy_arrays_and_scalars_in_pickles(tmp_path: Path) -> None:
    saved = {
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big endian": np.arange(3, dtype=">i4"),
        "dates": np.array(["2020-01-01", "2021-02-03"], "M8[25s]"),
        "texts": np.array(["ä", "bcd"]),
        "scalar": np.float16(2.5),
        "empty": np.zeros((0, 3), "u2"),
        "twice": [np.arange(3)] * 2,
    }
    torch.save(saved, tmp_path / "x.pt")
    found = load(tmp_path / "x.pt")
    assert_same(found, saved)
    assert found["fortran"].flags.f_contiguous
    assert found["twice"][0] is found["twice"][1]
    found["dates"][0] = 0  # not read-only


class Call:
    """Its pickle calls a global with arguments."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None):
        self.made = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.made


RECONSTRUCT = np.zeros(1).__reduce__()[0]
PARAMETER = torch.nn.Parameter(torch.ones(1)).__reduce_ex__(2)[0]


def array(shape: tuple[int, ...], dtype: str, content: Any) -> Call:
    state = (1, shape, np.dtype(dtype), False, content)
    return Call(RECONSTRUCT, np.ndarray, (0,), b"b", state=state)


HOSTILE: dict[str, tuple[Any, str]] = {
    "objects": (np.array([Counter]), "not read|damaged|array"),
    "array of nothing": (Call(RECONSTRUCT, np.ndarray, (0,), b"b"), "damaged"),
    "array of too much": (
        array((1 << 40,), "f4", b""),
        "0 bytes do not match an array of shape",
    ),
    "array of numbers": (
        array((9,), "u1", 9),
        "damaged",
    ),
    "records": (np.zeros(2, "i4,f4"), "structured numpy arrays"),
    "a dtype": (np.dtype("f4"), "contains a numpy.dtype, which is not supported"),
    "a class": (OrderedDict, "contains a collections.OrderedDict, which is not supported"),
    "a class in a set": ({torch.nn.Parameter}, "which is not supported"),
    "a class as key": ({torch.nn.Parameter: 1}, "which is not supported"),
    "parameter of text": (Call(PARAMETER, "text", True, {}), "damaged"),
    "parameter of numbers": (
        Call(PARAMETER, torch.arange(3), True, OrderedDict()),
        "damaged: .*floating point",
    ),
    "sparse": (torch.eye(2).to_sparse(), "contains a torch._utils._rebuild_sparse_tensor"),
    "module": (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear, which could run code"),
}


@pytest.mark.parametrize(("value", "complaint"), HOSTILE.values(), ids=list(HOSTILE))
def test_the_error_names_what_is_not_loaded(tmp_path: Path, value: Any, complaint: str) -> None:
    torch.save([value], tmp_path / "x.pt")
    with pytest.raises(FormatError, match=complaint) as caught:
        load(tmp_path / "x.pt")
    assert str(caught.value).startswith(str(tmp_path / "x.pt"))


def test_an_ordered_dict_that_holds_itself_as_attribute_is_refused(tmp_path: Path) -> None:
    state: Any = OrderedDict(a=1)
    state._metadata = {"again": state}
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(FormatError, match="contains itself"):
        load(tmp_path / "x.pt")


WORDS = [bytes([code]) for code in range(256)]
WORDS += [
    f"c{name.replace(':', chr(10))}\n".encode()
    for name in (
        "collections:OrderedDict",
        "collections:Counter",
        "numpy:dtype",
        "numpy:ndarray",
        "numpy._core.multiarray:_reconstruct",
        "numpy._core.multiarray:scalar",
        "torch:Size",
        "torch:device",
        "torch:float32",
        "torch._utils:_rebuild_tensor_v2",
        "torch._utils:_rebuild_parameter",
        "__builtin__:set",
        "__builtin__:bytearray",
        "_codecs:encode",
        "os:mkdir",
    )
]
WORDS += [b"R", b"b", b")R", b"}b", b"\x85R", b"\x86R", b"u.", b"tR", b"Q", b"h\x01", b"h\x07"]


def seeds(directory: Path) -> list[tuple[bytes, dict[str, bytes]]]:
    """Pickles of every kind, and the tensors beside them."""
    weight = torch.nn.Parameter(torch.randn(3, 2))
    trees: list[Any] = [
        {"w": weight, "t": weight.detach().T, "e": torch.zeros(1).expand(4), "f": torch.ones(2)},
        [np.arange(4.0), np.float32(3), np.array("2020", "M8[D]"), np.array(["ab"])],
        OrderedDict(a={1, 2}, b=Counter(x=1), c=frozenset({b"x"}), d=bytearray(b"abc"), e=1j),
        (torch.Size([2, 3]), torch.device("cuda:1"), torch.bfloat16, b"", 2**70, -1.5, None, "ä"),
        torch.nn.BatchNorm1d(2).state_dict(),
    ]
    found = []
    for tree in trees:
        save(tree, directory / "seed.pt")
        with zipfile.ZipFile(directory / "seed.pt") as file:
            records = {name.split("/", 1)[1]: file.read(name) for name in file.namelist()}
        storages = {k.removeprefix("data/"): v for k, v in records.items() if k.startswith("data/")}
        found.append((records["data.pkl"], storages))
    return found


@pytest.mark.parametrize("count", [2000, pytest.param(120_000, marks=pytest.mark.slow)])
@pytest.mark.timeout(1800)
def test_a_damaged_pickle_loads_or_is_refused(tmp_path: Path, count: int) -> None:
    """Whatever a pickle holds: a FormatError or values, nothing run, and little memory."""
    files, path = seeds(tmp_path), tmp_path / "x.pt"
    pickles = [pickled for pickled, _ in files]

    def make(random: Random) -> bytes:
        pickled, storages = random.choice(files)
        return archive(mutated(pickled, random, pickles, WORDS), storages)

    loaded = fuzz(path, make, lambda number: load(path, lazy=bool(number % 2)), count)
    assert count / 100 < loaded < count / 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["seed.pt", "x.pt"]


def test_a_billion_laughs_are_refused(tmp_path: Path) -> None:
    laughs: list[Any] = ["ha"]
    for _ in range(50):
        laughs = [laughs, laughs]
    (tmp_path / "x.pt").write_bytes(archive(pickle.dumps(laughs, 2)))
    with pytest.raises(FormatError, match="a tree of more than"):
        load(tmp_path / "x.pt")


def test_a_bomb_is_not_inflated(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x/data.pkl", pickle.dumps(None, 2))
        file.writestr("x/data/0", bytes(50 << 20))
    assert (tmp_path / "x.pt").stat().st_size < 100_000
    with pytest.raises(FormatError, match="is compressed"):
        load(tmp_path / "x.pt")
