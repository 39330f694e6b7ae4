"""Valid archives with invalid pickles: values, or a FormatError."""

import datetime
import enum
import functools
import io
import pickle
import random
import zipfile
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from random import Random
from types import SimpleNamespace
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


class Own:
    def __init__(self) -> None:
        self.itself = self


class Colour(enum.Enum):
    RED = 1


RECONSTRUCT = np.zeros(1).__reduce__()[0]
PARAMETER = torch.nn.Parameter(torch.ones(1)).__reduce_ex__(2)[0]


def array(shape: tuple[int, ...], dtype: str, content: Any) -> Call:
    state = (1, shape, np.dtype(dtype), False, content)
    return Call(RECONSTRUCT, np.ndarray, (0,), b"b", state=state)


HOSTILE: dict[str, tuple[Any, str]] = {
    "objects": (np.array([Counter]), "'0' holds a numpy.ndarray of objects or records"),
    "array of nothing": (Call(RECONSTRUCT, np.ndarray, (0,), b"b"), "holds a numpy.ndarray of"),
    "array of too much": (
        array((1 << 40,), "f4", b""),
        "0 bytes do not match an array of shape",
    ),
    "array of numbers": (array((9,), "u1", 9), "holds a numpy.ndarray of objects"),
    "records": (np.zeros(2, "i4,f4"), "'0' holds a numpy.ndarray of objects or records"),
    "a dtype": (np.dtype("f4"), "'0' holds a numpy.dtype"),
    "a class": (OrderedDict, "'0' holds the global collections.OrderedDict"),
    "a class in a set": ({torch.nn.Parameter}, "holds the global torch.nn.parameter.Parameter"),
    "a class as key": ({torch.nn.Parameter: 1}, "holds the global torch.nn.parameter.Parameter"),
    "parameter of text": (Call(PARAMETER, "text", True, {}), "a parameter"),
    "parameter of numbers": (
        Call(PARAMETER, torch.arange(3), True, OrderedDict()),
        "damaged: .*floating point",
    ),
    "sparse": (torch.eye(2).to_sparse(), "'0' holds a sparse tensor: save it after to_dense"),
    "quantized": (
        torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.quint8),
        r"'0' holds a quantized tensor: save it after dequantize\(\)",
    ),
    "nested": (torch.nested.nested_tensor([torch.ones(2)]), "'0' holds a nested tensor"),
    "conjugated": (torch.ones(2, dtype=torch.complex64).conj(), "save it after resolve_conj"),
    "storage": (torch.ones(2).untyped_storage(), "'0' holds a storage of torch"),
    "module": (torch.nn.Linear(2, 2), "holds a torch.nn.modules.linear.Linear.*unsafe=True"),
    "own class": ({"cfg": [Own()]}, r"'0.cfg.0' holds a tests.io.test_pt.Own: .*unsafe=True"),
    "enum": (Colour.RED, "'0' holds a tests.io.test_pt.Colour"),
    "generator": (torch.Generator(), "'0' holds a torch._C.Generator"),
    "partial": (functools.partial(int, base=2), "'0' holds a functools.partial"),
}


@pytest.mark.parametrize(("value", "complaint"), HOSTILE.values(), ids=list(HOSTILE))
def test_the_error_names_what_is_not_loaded(tmp_path: Path, value: Any, complaint: str) -> None:
    torch.save([value], tmp_path / "x.pt")
    with pytest.raises(FormatError, match=complaint) as caught:
        load(tmp_path / "x.pt")
    assert str(caught.value).startswith(str(tmp_path / "x.pt"))


VALUES: dict[str, Any] = {
    "numpy scalar": np.float64(0.25),
    "numpy array": np.arange(3),
    "namespace": Namespace(lr=1e-3, out=Path("/x"), inner=Namespace(w=torch.ones(2))),
    "simple namespace": SimpleNamespace(a=1),
    "date": datetime.date(2024, 2, 29),
    "datetime": datetime.datetime(2024, 1, 1, 2, 3, 4, 5, fold=1),
    "in a zone": datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC),
    "time": datetime.time(1, 2, tzinfo=datetime.timezone(datetime.timedelta(hours=-3))),
    "timedelta": datetime.timedelta(3, 4, 5),
    "set": {1, 2},
    "frozenset": frozenset([1, "a"]),
    "ordered": OrderedDict(b=1, a=torch.ones(1)),
    "defaultdict": defaultdict(dict, {0: {"step": 1}}),
    "counter": Counter("abca"),
    "deque": deque([1.0, torch.ones(2)], maxlen=5),
    "long deque": deque(range(100)),
    "path": Path("/a/b"),
    "windows path": PureWindowsPath("C:/a"),
    "range": range(3, 20, 2),
    "slice": slice(1, None, 2),
    "large integers": [2**3000, -(2**64), 2**70],
    "random states": [random.getstate(), np.random.RandomState(1).get_state()],
    "optimizer": torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))]).state_dict(),
    "parameters": list(torch.nn.Linear(2, 2).parameters()),
    "of torch": [torch.Size([1, 2]), torch.bfloat16, torch.device("cuda:1")],
    "bytes": [b"x" * 300, bytearray(b"y"), "é" * 300],
}


@pytest.mark.parametrize("name", VALUES)
def test_plain_values_of_other_programs_are_read_and_stored(tmp_path: Path, name: str) -> None:
    data = {"model": {"w": torch.ones(2)}, "value": VALUES[name]}
    for protocol in (2, 4, 5):
        torch.save(data, tmp_path / "x.pt", pickle_protocol=protocol)
        assert_same(load(tmp_path / "x.pt"), data)
    torch.save(data, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_same(load(tmp_path / "old.pt"), data)
    for suffix in (".sft", ".pt"):
        save(load(tmp_path / "x.pt"), tmp_path / f"again{suffix}")
        assert_same(load(tmp_path / f"again{suffix}"), data)


def test_what_is_not_loaded_is_left_out_on_demand(tmp_path: Path) -> None:
    data = {"a": Own(), "l": [1, Own()], "d": {Own: 1, "x": 2}, "n": Namespace(o=Own(), p=3)}
    torch.save(data, tmp_path / "x.pt")
    skipped: list[str] = []
    found = load(tmp_path / "x.pt", skipped=skipped)
    assert found == {"l": [1, None], "d": {"x": 2}, "n": Namespace(p=3)}
    assert [text.partition(" ")[0] for text in skipped] == ["'a'", "'l.1'", "'d'", "'n.o'"]
    torch.save(Own(), tmp_path / "x.pt")
    with pytest.raises(FormatError, match=r"it holds a tests.io.test_pt.Own"):
        load(tmp_path / "x.pt", skipped=[])


@pytest.mark.parametrize("suffix", [".pt", ".sft"])
def test_long_lists_come_back(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with 6 million numbers: no count of operations or values ends before the file does."""
    monkeypatch.setattr("harness.formats.unpickler.MAX_CONTAINERS", 10_000)
    monkeypatch.setattr("harness.formats.json_tree.MAX_NODES", 10_000)
    data = [list(range(100_000)), [True, None, 2**40] * 3, (0.5,) * 100_000]
    save(data, tmp_path / f"x{suffix}")
    assert load(tmp_path / f"x{suffix}") == data


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pt", ".sft"])
@pytest.mark.timeout(300)
def test_six_million_numbers_come_back(tmp_path: Path, suffix: str) -> None:
    data = list(range(6_000_000))
    save(data, tmp_path / f"x{suffix}")
    assert load(tmp_path / f"x{suffix}") == data


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
        "argparse:Namespace",
        "collections:deque",
        "collections:defaultdict",
        "datetime:datetime",
        "datetime:timedelta",
        "pathlib:PosixPath",
        "__builtin__:range",
        "__builtin__:slice",
        "__builtin__:getattr",
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
        [Namespace(p=Path("a")), deque([1], 3), defaultdict(list, a=1), datetime.date(2024, 1, 2)],
        {
            "f": frozenset([1]),
            "r": range(3),
            "s": slice(2),
            "t": datetime.timedelta(1),
            "z": SimpleNamespace(),
        },
    ]
    found = []
    for tree in trees:
        save(tree, directory / "seed.pt")
        with zipfile.ZipFile(directory / "seed.pt") as file:
            records = {name.split("/", 1)[1]: file.read(name) for name in file.namelist()}
        storages = {k.removeprefix("data/"): v for k, v in records.items() if k.startswith("data/")}
        found.append((records["data.pkl"], storages))
    return found


@pytest.mark.parametrize("count", [600, pytest.param(120_000, marks=pytest.mark.slow)])
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
