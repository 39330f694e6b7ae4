"""State dicts come back as they went."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from harness.errors import FormatError
from harness.io import load, save

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
    with pytest.raises(FormatError, match=r"expected one of \.pt"):
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
