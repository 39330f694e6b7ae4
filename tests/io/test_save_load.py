"""Structures are loaded as they were saved; other programs read the tensors of an `.sft`."""

import os
import random
import resource
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from harness.errors import FormatError
from harness.formats import json_tree
from harness.formats.tensor_writer import TensorWriter
from harness.io import load, save
from harness.io.structure import unpack
from tests.support.structures import assert_same

SUFFIXES = [".pt", ".pth", ".sft", ".safetensors"]


def state() -> dict[str, torch.Tensor]:
    weight = torch.arange(12.0).reshape(3, 4)
    return {
        "weight": weight,
        "tied": weight,
        "row": weight[1],
        "turned": weight.T,
        "complex": torch.tensor([1 + 2j, 3 - 4j]),
        "empty": torch.empty(0, 3),
        "empty_too": torch.empty(0, 3),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "half": torch.randn(5).bfloat16(),
        "mask": torch.tensor([True, False]),
        "learnt": torch.nn.Parameter(torch.ones(2)),
    }


def optimizer_state() -> dict[str, Any]:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1), betas=(0.9, 0.95))
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 3, 5])
    return {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}


def random_state() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),
        "generator": np.random.default_rng(3).bit_generator.state,
        "python": random.getstate(),
    }


def module_state() -> Any:
    state: Any = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).state_dict()
    assert state._metadata["1"] == {"version": 2}
    return state


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("make", [state, optimizer_state, random_state, module_state])
def test_the_state_of_a_training_comes_back(
    tmp_path: Path, make: Callable[[], Any], suffix: str, lazy: bool
) -> None:
    path, saved = tmp_path / f"x{suffix}", make()
    save(saved, path)
    found = load(path, lazy=lazy)
    assert_same(found, saved)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".sft", ".pt"])
def test_ties_are_restored(tmp_path: Path, suffix: str) -> None:
    save(state() | {"far": torch.zeros(10**6)[::1000]}, tmp_path / f"x{suffix}")
    found = load(tmp_path / f"x{suffix}")
    assert found["tied"].data_ptr() == found["weight"].data_ptr()
    found["turned"][0, 1] = 99
    assert found["row"][0] == found["weight"][1, 0] == 99
    assert (tmp_path / f"x{suffix}").stat().st_size < 20_000  # no more memory than was reachable


@pytest.mark.parametrize("made", [torch.save, lambda data, path: save(data, path)])
def test_what_torch_saves_is_read_as_torch_reads_it(tmp_path: Path, made: Any) -> None:
    saved = {"a": state(), "b": optimizer_state(), "c": random_state(), "d": module_state()}
    made(saved, tmp_path / "x.pt")
    expected = torch.load(tmp_path / "x.pt", weights_only=False)
    assert_same(load(tmp_path / "x.pt"), expected)


def test_other_programs_see_flat_weights_under_their_own_names(tmp_path: Path) -> None:
    path, saved = tmp_path / "x.sft", state()
    save(saved, path)
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(saved) - {"tied", "row", "turned"}
        assert file.metadata()["format"] == "pt"
        for name in file.keys():  # noqa: SIM118
            assert torch.equal(file.get_tensor(name), saved[name])


def test_a_plain_state_dict_needs_no_structure(tmp_path: Path) -> None:
    saved = {"b.weight": torch.randn(2, 3), "a.weight": torch.randn(4).half()}
    save(saved, tmp_path / "x.sft")
    with safe_open(tmp_path / "x.sft", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert list(load(tmp_path / "x.sft")) == list(saved)


def test_a_permuted_tensor_is_row_major_to_other_programs(tmp_path: Path) -> None:
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    expanded = torch.arange(3).expand(2, 3)
    save({"image": image, "expanded": expanded}, tmp_path / "x.sft")
    theirs, ours = load_file(tmp_path / "x.sft"), load(tmp_path / "x.sft")
    assert torch.equal(theirs["image"], image) and torch.equal(theirs["expanded"], expanded)
    assert ours["image"].is_contiguous(memory_format=torch.channels_last)
    assert ours["expanded"].stride() == (0, 1)


def test_nested_tensors_are_named_by_their_keys_and_all_names_differ(tmp_path: Path) -> None:
    saved = {
        "a": {"b": torch.tensor(1), 3: [torch.tensor(2)]},
        "a.b": torch.tensor(3),
        "__metadata__": torch.tensor(4),
        "__harness__.0": torch.tensor(5),
        "long": list(range(1000)),
        "\ud800": torch.tensor(6),
    }
    save(saved, tmp_path / "x.sft")
    assert_same(load(tmp_path / "x.sft"), saved)
    theirs = {name: tensor.tolist() for name, tensor in load_file(tmp_path / "x.sft").items()}
    assert theirs == {
        "a.b": 3,
        "a.b~2": 1,
        "a.3.0": 2,
        "__metadata__~2": 4,
        "tensor~__harness__.0": 5,
        "\\ud800": 6,
        "__harness__.0": list(range(1000)),
    }


@pytest.mark.parametrize("suffix", [".sft", ".pt"])
def test_a_conjugate_is_stored_conjugated(tmp_path: Path, suffix: str) -> None:
    """The safetensors library stores what it is the conjugate of."""
    path = tmp_path / f"x{suffix}"
    conjugate = torch.tensor([1 + 2j, 3 - 4j]).conj()
    save({"a": conjugate, "b": conjugate.imag}, path)
    assert load(path)["a"].tolist() == [1 - 2j, 3 + 4j]
    assert load(path)["b"].tolist() == [-2, 4]
    torch.save(conjugate, tmp_path / "y.pt")
    with pytest.raises(FormatError, match="conjugated"):
        load(tmp_path / "y.pt")


def test_a_bare_tensor_is_a_file_too(tmp_path: Path) -> None:
    save(torch.ones(3), tmp_path / "x.sft")
    assert list(load_file(tmp_path / "x.sft")) == ["tensor"]
    assert load(tmp_path / "x.sft").tolist() == [1, 1, 1]


@pytest.mark.parametrize("suffix", [".pt", ".sft"])
def test_windows_that_overlap_do_so_again(tmp_path: Path, suffix: str) -> None:
    saved = {
        "alone": torch.arange(6).unfold(0, 3, 1),
        "expanded": torch.arange(3).expand(2, 3),
        "several": [torch.arange(9)[start : start + 5] for start in (0, 2, 4)],
    }
    line = torch.arange(9)
    saved["tied"] = [line[start : start + 5] for start in (0, 2, 4)]
    save(saved, tmp_path / f"x{suffix}")
    assert_same(load(tmp_path / f"x{suffix}"), saved)


def test_windows_do_not_unfold_in_memory(tmp_path: Path) -> None:
    line = torch.arange(30_000)
    shape = (12_000, 12_000)  # 10^8 elements in no more memory than the line has
    saved = [line.as_strided(shape, (1, 1)), line.as_strided(shape, (1, 1), 3)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    save(saved, tmp_path / "x.sft")
    assert (tmp_path / "x.sft").stat().st_size < 300_000
    assert load(tmp_path / "x.sft")[1][1, 1] == 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@pytest.mark.parametrize(
    "view", [[1, [3], [1]], [0, [2, 2], [1, 2]], [3, [], []], [0, [1], [1, 1]]]
)
def test_a_view_beyond_its_tensor_is_refused(view: list[Any]) -> None:
    with pytest.raises(FormatError, match=r"invalid view|a view of"):
        unpack({"tensor": "a", "view": view}, lambda _: torch.arange(10)[:3])


def test_columns_of_one_matrix_are_not_tied(tmp_path: Path) -> None:
    matrix = torch.arange(12.0).reshape(3, 4)
    halves = dict(zip("ab", matrix.chunk(2, dim=1), strict=True))
    save(halves, tmp_path / "x.sft")
    assert set(load_file(tmp_path / "x.sft")) == {"a", "b"}
    assert_same(load(tmp_path / "x.sft"), halves)


class Subclass(torch.Tensor):
    pass


Pair = namedtuple("Pair", "x y")
LOOP: list[Any] = []
LOOP.append({"again": LOOP})
DEEP: list[Any] = []
for _ in range(200):
    DEEP = [DEEP]
BYTES = torch.zeros(8, dtype=torch.uint8)
ATTRIBUTES = OrderedDict()
ATTRIBUTES.extra = 3  # type: ignore[attr-defined]

REFUSED: dict[str, tuple[Any, str]] = {
    "object": (object(), "model.0.x: cannot store a builtins.object"),
    "function": (lambda: 3, "model.0.x: cannot store a builtins.function"),
    "namedtuple": (Pair(1, 2), "cannot store a tests.io.test_save_load.Pair"),
    "defaultdict": (defaultdict(lambda: 3), "cannot store a collections.defaultdict"),
    "zone": (datetime.now(ZoneInfo("UTC")), "cannot store a datetime.datetime"),
    "iterator": (iter([3]), "cannot store a builtins.list_iterator"),
    "attributes": (ATTRIBUTES, "model.0.x: cannot store attributes: extra"),
    "object array": (np.array([object()]), "cannot store a numpy array of object"),
    "records": (np.zeros(2, "i4,f4"), "cannot store a numpy array of"),
    "masked array": (np.ma.array([1]), "cannot store a numpy.ma.MaskedArray"),
    "cycle": (LOOP, r"model.0.x.0.again: contains itself"),
    "deep": (DEEP, "nested deeper than 100 levels"),
    "key": ({object(): 1}, "cannot store a key of type builtins.object"),
    "nested key": ({(1, (2, 3)): 1}, "cannot store a key of type builtins.tuple"),
    "tensor as key": ({torch.ones(1): 1}, "cannot store a key of type torch.Tensor"),
    "subclass": (torch.ones(2).as_subclass(Subclass), "model.0.x: cannot store a Subclass"),
    "sparse": (torch.eye(2).to_sparse(), r"tensor of layout torch.sparse_coo: use to_dense\(\)"),
    "meta": (torch.ones(2, device="meta"), "tensor without data, on the meta device"),
    "quantized": (
        torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8),
        "tensor of torch.qint8",
    ),
    "two dtypes": (
        [BYTES, BYTES.view(torch.float32)],
        r"model.0.x.1 \(torch.float32\) shares memory with model.0.x.0 \(torch.uint8\)",
    ),
}


@pytest.mark.parametrize("suffix", [".pt", ".sft"])
@pytest.mark.parametrize(("value", "complaint"), REFUSED.values(), ids=list(REFUSED))
def test_what_cannot_be_stored_is_named_and_the_old_file_kept(
    tmp_path: Path, value: Any, complaint: str, suffix: str
) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_text("old")
    os.utime(path, (1, 1))
    with pytest.raises(FormatError, match=complaint) as caught:
        save({"fine": torch.ones(2), "model": [{"x": value}]}, path)
    assert str(caught.value).startswith(f"{path}: model.0.x")
    assert path.read_text() == "old" and path.stat().st_mtime == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_list_with_exponentially_many_values_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_tree, "MAX_NODES", 100_000)
    laughs: list[Any] = ["ha"]
    for _ in range(40):
        laughs = [laughs, laughs]
    with pytest.raises(FormatError, match="more than 100000 values"):
        save(laughs, tmp_path / "x.sft")


@pytest.mark.parametrize("suffix", [".pt", ".sft"])
def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    save({"a": 1}, tmp_path / f"x{suffix}")
    monkeypatch.setattr(TensorWriter, "write", fail)
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        save({"a": torch.ones(2)}, tmp_path / f"x{suffix}")
    assert load(tmp_path / f"x{suffix}") == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == [f"x{suffix}"]


@pytest.mark.parametrize("name", ["x.txt", "x"])
def test_an_unknown_format_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(FormatError, match=r"expected one of \.bin, \.ckpt, \.pt"):
        save({}, tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / name).write_bytes(b"others")
    with pytest.raises(FormatError, match=r"x.*: not a file of weights"):
        load(tmp_path / name)


def test_a_pickle_with_code_is_not_run_unless_asked_for(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple:
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save(Code(), tmp_path / "x.pt")
    for lazy in (False, True):
        with pytest.raises(FormatError, match=r"posix.mkdir: only plain .* unsafe=True"):
            load(tmp_path / "x.pt", lazy=lazy)
    assert not (tmp_path / "ran").exists()
    load(tmp_path / "x.pt", unsafe=True)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".pt", ".sft"])
def test_lazy_tensors_are_mapped_from_the_file_and_do_not_change_it(
    tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"x{suffix}"
    save({"big": torch.zeros(1 << 26, dtype=torch.uint8), "small": torch.ones(3)}, path)
    before = _resident()
    found = load(path, lazy=True)
    assert _resident() - before < 8 << 20
    found["small"][0] = 5
    assert found["small"].tolist() == [5, 1, 1] and load(path)["small"].tolist() == [1, 1, 1]
    path.unlink()
    assert found["big"].sum() == 0
    with pytest.raises(ValueError, match="device = meta: with lazy, expected cpu"):
        load(path, device="meta", lazy=True)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_damage_to_a_pt_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    save({"a": torch.arange(100)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(100).numpy().tobytes()) + 80] ^= 1
    path.write_bytes(content)
    assert not torch.equal(torch.load(path)["a"], torch.arange(100))  # torch does not look
    with pytest.raises(FormatError, match=r"damaged: wrong CRC of x/data/0|wrong CRC"):
        load(path)
