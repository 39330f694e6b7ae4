"""What lies beside the weights: in the client state of a checkpoint, in other programs' files.

The checkpoint is written as DeepSpeed does, without ranks.
"""

import argparse
import datetime
import logging
import pickletools
import subprocess
import sys
import zipfile
from collections import OrderedDict, deque
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.checkpoint.init_weights import read_weights
from harness.checkpoint.inspect import describe_path
from harness.convert.convert import Options, convert
from harness.errors import HarnessError
from harness.formats.safetensors import read_header
from harness.io import load
from tests.support.structures import assert_same

WEIGHTS = {"a.weight": torch.arange(12.0).reshape(3, 4), "a.bias": torch.arange(3.0)}


class Custom:
    def __init__(self) -> None:
        self.rate, self.shared = 0.5, torch.arange(4.0)

    class Inner(list):
        pass


class Recursive:
    def __init__(self) -> None:
        self.itself = self


def custom() -> dict[str, Any]:
    inner = Custom.Inner([1, Custom()])
    vars(inner)["note"] = "kept"
    return {"cfg": Custom(), "kind": Custom, "inner": inner}


STATES: dict[str, dict[str, Any]] = {
    "plain": {"epoch": 3, "s": {1, 2}, "t": torch.ones(2)},
    "numpy": {"best": np.float64(0.5), "rng": np.random.RandomState(1).get_state()},
    "datetime": {"at": datetime.datetime(2024, 1, 1)},
    "namespace": {"args": argparse.Namespace(lr=1, p=Path("/x"))},
    "device": {"dev": torch.device("cuda:0"), "dt": torch.bfloat16, "size": torch.Size([1, 2])},
    "deque": {"q": deque([1])},
    "custom": custom(),
}


def write(directory: Path, client: dict[str, Any], module: dict[str, Any] | None = None) -> Path:
    """A checkpoint of ZeRO 2 on one rank, after step 3."""
    tag = directory / "global_step3"
    tag.mkdir(parents=True)
    (directory / "latest").write_text(tag.name)
    flat = torch.cat([weight.flatten() for weight in WEIGHTS.values()])
    state = {"step": torch.tensor(3.0), "exp_avg": flat + 1, "exp_avg_sq": flat + 2}
    group = {"lr": np.float64(0.125), "params": [0]}
    optimizer = {
        "zero_stage": 2,
        "loss_scaler": None,
        "partition_count": [1],
        "group_paddings": [0],
        "param_alignment_paddings": [[0, 0]],
        "single_partition_of_fp32_groups": [flat],
        "base_optimizer_state": {"state": {0: state}, "param_groups": [group]},
    }
    model = {
        "module": OrderedDict(WEIGHTS) | (module or {}),
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [OrderedDict((n, w.shape) for n, w in WEIGHTS.items())],
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": {},
        "dp_world_size": 1,
        "global_steps": 3,
        "ds_config": {"zero_optimization": {"stage": 2}},
        "ds_version": "0.19.8",
    }
    torch.save(model | client, tag / "mp_rank_00_model_states.pt")
    tree = {"optimizer_state_dict": optimizer, "ds_version": "0.19.8"}
    torch.save(tree, tag / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    return directory


@pytest.mark.parametrize("name", STATES)
def test_weights_come_out_beside_any_client_state(tmp_path: Path, name: str) -> None:
    source = write(tmp_path / "was", STATES[name])
    convert(source, tmp_path / "x.sft", Options(what="all", verify=True), print)
    found = load(tmp_path / "x.sft")
    assert all(found[name].equal(weight) for name, weight in WEIGHTS.items())
    described = "\n".join(describe_path(source / "global_step3/mp_rank_00_model_states.pt"))
    is_named = "not read: 'cfg', a tests.convert.test_client_state.Custom" in described
    assert "a.weight" in described and is_named == (name == "custom")


def globals_in(path: Path) -> set[str]:
    """The modules that the pickle in a file names."""
    with zipfile.ZipFile(path) as file:
        pickled = file.read(next(n for n in file.namelist() if n.endswith("data.pkl")))
    named = [arg for op, arg, _ in pickletools.genops(pickled) if op.name == "GLOBAL"]
    return {str(arg).split()[0].split(".")[0] for arg in named}


@pytest.mark.parametrize("name", STATES)
def test_to_zero_writes_the_client_state_as_it_was(tmp_path: Path, name: str) -> None:
    source = write(tmp_path / "was", STATES[name])
    convert(source, tmp_path / "now", Options(to_zero=2), print)
    path = tmp_path / "now/global_step3/mp_rank_00_model_states.pt"
    for file in path.parent.iterdir():
        assert "harness" not in globals_in(file)
    found = torch.load(path, weights_only=False)
    if name != "custom":
        assert_same({key: found[key] for key in STATES[name]}, deepcopy(STATES[name]))
        return
    cfg, inner = found["cfg"], found["inner"]
    assert type(cfg) is Custom and cfg.rate == 0.5 and cfg.shared.equal(torch.arange(4.0))
    assert found["kind"] is Custom and type(inner) is Custom.Inner and vars(inner)["note"] == "kept"
    assert inner[0] == 1 and type(inner[1]) is Custom


def test_the_client_state_is_loaded_without_harness(tmp_path: Path) -> None:
    client = STATES["namespace"] | STATES["device"] | STATES["numpy"] | STATES["deque"]
    convert(write(tmp_path / "was", client), tmp_path / "now", Options(to_zero=2), print)
    path = tmp_path / "now/global_step3/mp_rank_00_model_states.pt"
    code = (
        "import sys, torch; sys.modules['harness'] = None; "
        f"torch.load({str(path)!r}, weights_only=False)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/", env={})


def test_to_zero_refuses_what_it_cannot_write_again(tmp_path: Path) -> None:
    source = write(tmp_path / "was", {"cfg": {"deep": [Recursive()]}})
    with pytest.raises(HarnessError, match=r"'cfg': an object of an unknown class cannot be"):
        convert(source, tmp_path / "now", Options(to_zero=2), print)
    assert [path.name for path in tmp_path.iterdir()] == ["was"]
    convert(source, tmp_path / "x.sft", Options(), print)


def test_what_is_not_a_tensor_in_the_state_dict_is_skipped(tmp_path: Path) -> None:
    odd = {"m._extra_state": None, "m.config": Custom()}
    lines: list[str] = []
    convert(write(tmp_path / "was", {}, odd), tmp_path / "x.sft", Options(), lines.append)
    assert set(load(tmp_path / "x.sft")) == set(WEIGHTS)
    assert "note: skipped 'm._extra_state': not a tensor, but None" in lines
    assert any("'m.config': not a tensor, but a tests.convert" in line for line in lines)
    sparse = write(tmp_path / "sparse", {}, {"w": torch.eye(2).to_sparse()})
    with pytest.raises(HarnessError, match="'w' cannot be read: it is a sparse tensor"):
        convert(sparse, tmp_path / "y.sft", Options(), print)


def test_weights_beside_other_objects_are_converted_and_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    torch.save(WEIGHTS | {"m._extra_state": None, "cfg": Custom()}, tmp_path / "x.pt")
    lines: list[str] = []
    convert(tmp_path / "x.pt", tmp_path / "x.sft", Options(dtype="bf16"), lines.append)
    assert load(tmp_path / "x.sft").keys() == WEIGHTS.keys() and len(lines) == 3
    assert read_weights(tmp_path / "x.pt", "net").keys() == WEIGHTS.keys()
    assert "init_from: skipped 'm._extra_state': not a tensor, but None" in caplog.text
    torch.save({"model": WEIGHTS, "epoch": 3, "cfg": Custom()}, tmp_path / "x.pt")
    convert(tmp_path / "x.pt", tmp_path / "x.sft", Options(), lines.append)
    assert_same(load(tmp_path / "x.sft"), deepcopy(WEIGHTS))
    assert "note: the weights of key 'model'; left out: 'epoch', 'cfg'" in lines


def test_files_from_before_torch_1_6_are_converted(tmp_path: Path) -> None:
    torch.save(OrderedDict(WEIGHTS), tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    convert(tmp_path / "x.pt", tmp_path / "x.sft", Options(verify=True), print)
    assert_same(load(tmp_path / "x.sft"), deepcopy(WEIGHTS))
    assert_same(dict(load(tmp_path / "x.pt", lazy=True)), deepcopy(WEIGHTS))


def test_numbers_of_numpy_in_the_optimizers_settings_are_numbers(tmp_path: Path) -> None:
    source = write(tmp_path / "was", {})
    convert(source, tmp_path / "x.sft", Options(what="optimizer"), print)
    with (tmp_path / "x.sft").open("rb") as file:
        assert rb"\"lr\": 0.125" in file.read()


def test_pairs_of_4_bits_are_converted_both_ways(tmp_path: Path) -> None:
    dtype = getattr(torch, "float4_e2m1fn_x2", None)
    if dtype is None:
        pytest.skip("this torch has no float4")
    weights = {"w": torch.arange(6, dtype=torch.uint8).reshape(2, 3).view(dtype)} | WEIGHTS
    torch.save(weights, tmp_path / "x.pt")
    convert(tmp_path / "x.pt", tmp_path / "x.sft", Options(verify=True), print)
    assert read_header(tmp_path / "x.sft").tensors["w"].shape == (2, 6)
    convert(tmp_path / "x.sft", tmp_path / "again.pt", Options(verify=True), print)
    for name in ("x.sft", "again.pt"):
        assert_same(load(tmp_path / name), deepcopy(weights))
