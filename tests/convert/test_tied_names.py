"""Checkpoints whose list of ties is incomplete or wrong, and rank files that were exchanged."""

import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_model
from torch import Tensor, nn

from harness import io
from harness.convert.convert import Options, convert
from harness.errors import HarnessError
from harness.formats import pt_reader
from harness.zero.reader import SavedEngine
from harness.zero.tied_names import source_names
from tests.support import tied_models
from tests.support.helpers import Pools, assert_equal

Checkpoints = Callable[[int, str], Path]
SEED = 8
"""Of a model with tied frozen parameters, too."""
FILES = {
    1: "zero_pp_rank_{}_mp_rank_00_optim_states.pt",
    2: "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt",
    3: "zero_pp_rank_{}_mp_rank_00_model_states.pt",
}
LAYOUTS = [(1, "fp32"), (2, "bf16"), (3, "bf16")]


@pytest.fixture(scope="module")
def checkpoints(pools: Pools, tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """What plain DeepSpeed wrote on 2 ranks, by ZeRO stage and dtype."""

    @cache
    def at(stage: int, dtype: str) -> Path:
        directory = tmp_path_factory.mktemp(f"zero{stage}")
        pools(2).run(tied_models.write, directory, SEED, stage, dtype)
        return directory

    return at


def converted(source: Path, **options: Any) -> dict[str, Tensor]:
    path = source.parent / "converted.sft"
    convert(source, path, Options(**options), print)
    return io.load(path)


def changed(source: Path, to: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a checkpoint with other trees of model_states."""
    ties = SavedEngine(source / "here").shared
    for path in shutil.copytree(source / "here", to / "here").glob("*_model_states.pt"):
        tree = torch.load(path, weights_only=False)
        for name, other in ties.items():  # torch.load unties what has no elements
            tree["module"][name] = tree["module"][other]
        change(tree)
        torch.save(tree, path)
    return to / "here"


def listing(ties: dict[str, str] | None) -> Callable[[dict[str, Any]], None]:
    return lambda tree: tree.update(shared_params=ties)


def copied(tree: dict[str, Any]) -> None:
    """As a writer that does not keep what is shared."""
    tree["module"] = {name: tensor.clone() for name, tensor in tree["module"].items()}


@pytest.mark.parametrize(("stage", "dtype"), LAYOUTS)
def test_the_place_in_the_file_counts_and_not_the_list(
    checkpoints: Checkpoints, tmp_path: Path, stage: int, dtype: str
) -> None:
    source = checkpoints(stage, dtype)
    masters, saved = torch.load(source / "masters.pt"), SavedEngine(source / "here")
    assert saved.shared.keys() > saved.model["shared_params"].keys()  # DeepSpeed misses some
    names = [*saved.shapes]
    wrong = dict(zip(names, reversed(names), strict=True))
    for number, ties in enumerate(({}, None, wrong)):
        directory = changed(source, tmp_path / str(number), listing(ties))
        assert_equal(converted(directory, verify=True), masters)
        assert_equal(
            converted(directory, what="weights", dtype="keep"), torch.load(source / "live.pt")
        )
        convert(directory, tmp_path / f"zero{number}", Options(to_zero=3, ranks=2), print)
        assert_equal(converted(tmp_path / f"zero{number}", verify=True), masters)


@pytest.mark.parametrize(("stage", "dtype"), LAYOUTS[1:])
def test_the_list_counts_where_every_entry_is_a_copy(
    checkpoints: Checkpoints, tmp_path: Path, stage: int, dtype: str
) -> None:
    source = checkpoints(stage, dtype)
    ties, masters = SavedEngine(source / "here").shared, torch.load(source / "masters.pt")

    def change(tree: dict[str, Any]) -> None:
        copied(tree)
        tree["shared_params"] = ties

    directory = changed(source, tmp_path, change)
    assert_equal(converted(directory, verify=True), masters)


def test_a_name_without_a_source_is_an_error(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Saves in the background have put all placeholders at one place."""
    source, place = checkpoints(3, "bf16"), torch.empty(0, dtype=torch.bfloat16)

    def change(tree: dict[str, Any]) -> None:
        for name, tensor in tree["module"].items():
            if not tensor.numel():
                tree["module"][name] = place

    directory = changed(source, tmp_path, change)
    saved = SavedEngine(source / "here")
    lost = next(name for name in saved.shared if name not in saved.model["shared_params"])
    message = re.escape(f"{directory}: the weights of {lost!r} cannot be found: ")
    for options in (Options(), Options(what="all"), Options(to_zero=2)):
        with pytest.raises(HarnessError, match=message):
            convert(directory, tmp_path / "x.sft", options, print)
    trained = converted(directory, what="optimizer")  # which has each tensor once
    assert_equal(trained, converted(source / "here", what="optimizer"))

    def change_listed(tree: dict[str, Any]) -> None:
        change(tree)
        tree["shared_params"] = saved.shared

    directory = changed(source, tmp_path / "listed", change_listed)
    assert_equal(converted(directory), torch.load(source / "masters.pt"))


@pytest.mark.parametrize(("stage", "dtype"), LAYOUTS)
def test_frozen_parameters_may_be_left_out(
    checkpoints: Checkpoints, tmp_path: Path, stage: int, dtype: str
) -> None:
    """DeepSpeed leaves out one name of each, and at stage 3 placeholders under the others."""
    source = checkpoints(stage, dtype)
    masters, lines = torch.load(source / "masters.pt"), []
    convert(source / "lean", tmp_path / "x.sft", Options(verify=True), lines.append)
    found = io.load(tmp_path / "x.sft")
    trained = {n for n, p in tied_models.model(SEED).named_parameters() if p.requires_grad}
    assert trained <= found.keys() < masters.keys()
    assert_equal(found, {name: masters[name] for name in found})
    notes = [line for line in lines if "whose weights are not in the files" in line]
    assert len(notes) == (3 if stage == 3 else 0)
    convert(source / "lean", tmp_path / "zero2", Options(to_zero=2), print)


@pytest.mark.parametrize(("stage", "dtype"), LAYOUTS)
def test_files_of_exchanged_ranks_are_noticed(
    checkpoints: Checkpoints, tmp_path: Path, stage: int, dtype: str
) -> None:
    directory = shutil.copytree(checkpoints(stage, dtype) / "here", tmp_path / "here")
    one, other = (directory / FILES[stage].format(rank) for rank in (0, 1))
    one.rename(tmp_path / "one")
    other.rename(one)
    (tmp_path / "one").rename(other)
    kind = one.name.split("_00_")[1]
    with pytest.raises(HarnessError, match=f"{kind} of rank 0 is the file that rank 1 wrote"):
        converted(directory)
    if stage == 3:
        return
    for path in (one, other):  # as some programs write them, without the name of the file
        tree = torch.load(path, weights_only=False)
        with path.open("wb") as file:
            torch.save(tree, file)
    converted(directory)
    with pytest.raises(HarnessError, match="are not its rounded master weights"):
        converted(directory, verify=True)


def test_every_name_of_a_tied_parameter_is_verified(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    source = checkpoints(2, "bf16")
    listed = SavedEngine(source / "here").model["shared_params"]
    name = next(iter(listed))

    def change(tree: dict[str, Any]) -> None:
        copied(tree)
        tree["module"][name] += 1

    directory = changed(source, tmp_path, change)
    message = f"weights of '{name}', which is tied to '{listed[name]}', are not its rounded master"
    with pytest.raises(HarnessError, match=re.escape(message)):
        converted(directory, verify=True)


@pytest.mark.parametrize("shard_size", [None, 200])
def test_a_model_is_filled_from_one_name_of_each_tie(
    checkpoints: Checkpoints, tmp_path: Path, shard_size: int | None
) -> None:
    """As docs/files.md says: of a file by safetensors itself, of shards by harness.io."""
    source, path = checkpoints(1, "fp32"), tmp_path / ("shards" if shard_size else "x.sft")
    lines: list[str] = []
    convert(source, path, Options(shard_size=shard_size), lines.append)
    model = tied_models.model(SEED)
    for tensor in model.state_dict().values():
        tensor.zero_()
    if shard_size:
        assert len(list(path.glob("*.safetensors"))) > 1
        model.load_state_dict(io.load(path))
    else:
        assert load_model(model, path) == (set(), [])
    assert_equal(model.state_dict(), converted(source))
    names = model.state_dict(keep_vars=True)
    count = len({id(tensor) for tensor in names.values()})
    assert f": {count} tensors (and {len(names) - count} tied names), " in lines[-1]


def test_only_the_same_tensor_is_tied(tmp_path: Path) -> None:
    """Even if all are listed as tied, as DeepSpeed lists those without elements."""
    first = torch.randn(3, 3)
    tensors = {
        "first": first,
        "again": nn.Parameter(first),
        "turned": first.t(),
        "part": first[:2],
        "owner": first.view(3, 3),
        "empty": torch.empty(0, 3),
        "none": torch.empty(2, 0),
    }
    torch.save(tensors, tmp_path / "x.pt")
    module = pt_reader.read(tmp_path / "x.pt")
    names = {name: name for name in tensors}
    assert source_names(module, {"first"}, module, {}) == names | {
        "again": "first",
        "owner": "first",
    }
    listed = dict.fromkeys(tensors, "none")
    assert source_names(module, {"first", "owner"}, module, listed) == names
    assert source_names(module, {"first"}, (), {}) == dict.fromkeys(
        ("first", "again", "owner"), "first"
    )
