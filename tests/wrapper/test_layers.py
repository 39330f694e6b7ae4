"""Layers and optimizers of torchao and bitsandbytes, as far as a CPU goes (extra: quant)."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from harness.config import Config
from harness.config.sections import LAYER_PACKAGES
from harness.errors import ConfigError
from harness.io import load
from harness.run import run_in_world
from harness.testing.pool import RankPool
from harness.utils import import_path
from harness.wrapper import replace
from harness.zero.reader import SavedEngine
from tests.support.helpers import error_of, losses, tiny_config

AO, BNB = "harness.wrapper.layers.torchao", "harness.wrapper.layers.bitsandbytes"
LINEARS = [f"{AO}:float8_linear", f"{AO}:int8_linear", f"{BNB}:Int8Linear"]


def needs(path: str) -> None:
    pytest.importorskip(LAYER_PACKAGES[path.partition(":")[0]], reason="needs the extra: quant")


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs, and the gradients of inputs and parameters."""
    x = x.detach().requires_grad_()
    output = model(x)
    output.float().square().sum().backward()
    found = [output.detach(), x.grad, *(p.grad for p in model.parameters())]
    return [tensor.float() for tensor in found if tensor is not None]


@pytest.mark.parametrize("by", LINEARS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_of_8_bits_computes_about_the_same(by: str, dtype: torch.dtype) -> None:
    needs(by)
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 32, bias=False)).to(
        dtype
    )
    x = torch.randn(2, 16, 64).to(dtype)
    expected = gradients(model, x)
    model.zero_grad()
    weight = model[0].weight
    replace(model, nn.Linear, import_path(by))
    assert not any(type(module) is nn.Linear for module in model)
    assert model[0].weight is weight
    found = gradients(model, x)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert 0 < (one - other).norm() / other.norm() < 0.1
    with torch.no_grad():
        before = model.eval()(x)
        weight.mul_(2)
        assert (model(x) - before).abs().max() > 0.1  # no rounded weight of before is kept


@pytest.mark.parametrize("by", LINEARS)
@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_with_layers_of_8_bits_learns(
    two_ranks: RankPool, tmp_path: Path, plain: Callable[[int], Config], by: str, stage: int
) -> None:
    needs(by)
    entry = {"what": "torch.nn:Linear", "by": by, "include": "middle|again"}
    config = tiny_config(tmp_path, stage, optimizations={"replace": [entry]}, run={"steps": 20})
    two_ranks.run(run_in_world, config)
    found, expected = losses(config), losses(plain(stage))
    assert found != expected
    assert found == pytest.approx(expected, abs=0.05)
    assert sum(found[-3:]) < 0.9 * sum(found[:3])
    assert load(exports(config)).keys() == load(exports(plain(stage))).keys()


@pytest.fixture(scope="module")
def plain(two_ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Config]:
    done: dict[int, Config] = {}

    def run(stage: int) -> Config:
        if stage not in done:
            done[stage] = tiny_config(tmp_path_factory.mktemp("plain"), stage, run={"steps": 20})
            two_ranks.run(run_in_world, done[stage])
        return done[stage]

    return run


def exports(config: Config) -> Path:
    return config.run_dir / f"exports/step-{config.run.steps:08d}/net.sft"


def test_sizes_that_have_no_fp8_are_refused() -> None:
    needs(AO)
    with pytest.raises(
        ConfigError, match=r"\[16, 6\], expected multiples of 16: exclude this layer"
    ):
        replace(nn.Sequential(nn.Linear(6, 16)), nn.Linear, import_path(f"{AO}:float8_linear"))


def test_a_gpu_without_fp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    needs(AO)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(ConfigError, match=r"capability \(8, 0\), expected at least \(8, 9\)"):
        replace(nn.Sequential(nn.Linear(16, 16)), nn.Linear, import_path(f"{AO}:float8_linear"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stable_embedding_is_normed_in_fp32(dtype: torch.dtype) -> None:
    needs(BNB)
    model: Any = nn.Sequential(nn.Embedding(10, 16, padding_idx=3)).to(dtype)
    weight = model[0].weight
    replace(model, nn.Embedding, import_path(f"{BNB}:stable_embedding"))
    assert model[0].weight is weight and not weight[3].any()
    assert list(model.state_dict()) == ["0.weight", "0.norm.weight", "0.norm.bias"]
    assert {p.dtype for p in model.parameters()} == {dtype}
    found = model(torch.arange(10))
    expected = nn.functional.layer_norm(weight.float(), (16,)).to(dtype)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("module", LAYER_PACKAGES)
def test_a_missing_package_is_a_config_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    requirement = LAYER_PACKAGES[module]
    package = requirement.partition("[")[0]
    importlib.import_module("harness.wrapper.layers")
    monkeypatch.setitem(sys.modules, package, None)
    entry = {"what": "torch.nn:Linear", "by": f"{module}:float8_linear"}
    with pytest.raises(ValidationError, match=f"{package} is not installed: pip install"):
        tiny_config(tmp_path, optimizations={"replace": [entry]})


# --------------------------------------------------------------------------------------- optimizers


def eight_bit(directory: Path, stage: int, name: str, steps: int, **engine: Any) -> Config:
    """A model large enough for 8-bit state: bitsandbytes keeps that of small tensors in 32 bits."""
    return tiny_config(
        directory,
        stage,
        run={"steps": steps},
        task={"args": {"width": 96}},
        engines={"net": {"optimizer": {"name": name, "lr": 1e-3}} | engine},
    )


@pytest.mark.parametrize(
    ("name", "stage"), [("adamw8bit", stage) for stage in (0, 1, 2, 3)] + [("lion8bit", 2)]
)
def test_an_optimizer_with_8_bit_state_resumes_bit_identically(
    two_ranks: RankPool, tmp_path: Path, name: str, stage: int
) -> None:
    needs(BNB)
    whole = eight_bit(tmp_path / "whole", stage, name, 6)
    parts = [eight_bit(tmp_path / "cut", stage, name, steps) for steps in (3, 6)]
    for config in (whole, *parts):
        two_ranks.run(run_in_world, config)
    assert losses(parts[1]) == losses(whole)
    assert losses(whole)[-1] < losses(whole)[0]
    saved = SavedEngine(whole.run_dir / "checkpoints/step-00000006/net")
    saved_states = [flat.state.get("__bnb_optimizer_quant_state__") for flat in saved.flats[0]]
    assert "uint8" in {state["state1"].dtype for state in saved_states if state}
    found, expected = load(exports(parts[1])), load(exports(whole))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_8_bit_state_is_not_resharded(two_ranks: RankPool, tmp_path: Path) -> None:
    needs(BNB)
    two_ranks.run(run_in_world, eight_bit(tmp_path, 2, "adamw8bit", 2))
    (error, _) = two_ranks.run(error_of, eight_bit(tmp_path, 3, "adamw8bit", 4))
    assert "is a dict of tensors, as of 8-bit optimizers: it cannot be resharded" in error
    assert "Traceback" not in error
