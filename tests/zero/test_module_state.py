"""Loading a model's state dict is what torch's own loading is."""

from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion

from harness.zero import module_state


class Renamed(nn.Linear):
    """Reads its weight under an older name, by a hook, and has an extra state."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.extra = 0
        self.register_load_state_dict_pre_hook(self._rename)

    @staticmethod
    def _rename(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        if f"{prefix}old" in state:
            state[f"{prefix}weight"] = state.pop(f"{prefix}old")

    def get_extra_state(self) -> int:
        return self.extra

    def set_extra_state(self, state: int) -> None:
        self.extra = state


class Parent(nn.Module):
    """Moves an entry from one child to another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.ab = nn.Linear(3, 3, bias=False), nn.Linear(3, 3)
        self.none = None

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **named: Any) -> None:
        if f"{prefix}a.bias" in state_dict:
            state_dict[f"{prefix}ab.bias"] = state_dict.pop(f"{prefix}a.bias")
        super()._load_from_state_dict(state_dict, prefix, *args, **named)


def model_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    tied = nn.Linear(3, 3)
    layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(12)])
    model = nn.Sequential(nn.BatchNorm1d(3), layers, Renamed(), Parent(), tied, tied, nn.ReLU())
    with torch.no_grad():
        model[0](torch.randn(5, 3))
    model[2].extra = seed  # type: ignore[union-attr]
    return model


def remove(state: dict[str, Any]) -> None:
    del state["1.11.bias"], state["0.running_mean"]


def add(state: dict[str, Any]) -> None:
    state |= {"1.11.more": torch.ones(1), "1.12.bias": torch.ones(1), "9": torch.ones(1)}


def reshape(state: dict[str, Any]) -> None:
    state["3.a.weight"] = torch.ones(2)
    remove(state)
    add(state)


def rename(state: dict[str, Any]) -> None:
    state["2.old"], state["3.a.bias"] = state.pop("2.weight"), state.pop("3.ab.bias")


def forget_versions(state: dict[str, Any]) -> None:
    del state["_metadata"], state["0.num_batches_tracked"]


def loaded(load: Any, change: Any, strict: bool) -> tuple[Any, dict[str, Any]]:
    """What `load` returns, or its error; and the model then."""
    model, state = model_of(1), cast(Any, model_of(2).state_dict())
    changed = {**state, "_metadata": state._metadata}
    change(changed)
    metadata = changed.pop("_metadata", None)
    state.clear()
    state.update(changed)
    if metadata is None:
        del state._metadata
    before = list(state)
    try:
        result = load(model, state, strict=strict)
    except RuntimeError as error:
        result = str(error)
    assert list(state) == before
    return result, dict(model.state_dict())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("change", [dict.copy, remove, add, reshape, rename, forget_versions])
def test_loading_is_as_torch_loads(change: Any, strict: bool) -> None:
    result, found = loaded(module_state.load, change, strict)
    expected, theirs = loaded(nn.Module.load_state_dict, change, strict)
    assert result == expected
    assert found.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(value)), name


def test_a_newer_torch_loads_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2)
    for version, is_ours in (("2.13.1+cpu", True), ("2.14.0", False), ("3.0.0", False)):
        monkeypatch.setattr(torch, "__version__", TorchVersion(version))
        with module_state.loading(model):
            assert ("load_state_dict" in vars(model)) == is_ours


def test_a_model_that_loads_by_itself_does() -> None:
    class Own(nn.Linear):
        def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return "own"

    for model, expected in ((Own(2, 2), "own"), (nn.Linear(2, 2), ([], []))):
        with module_state.loading(model):
            assert model.load_state_dict(nn.Linear(2, 2).state_dict()) == expected
        assert "load_state_dict" not in vars(model)
