"""Checkpoints that every version of DeepSpeed since 0.8 wrote; tests/support/old_deepspeed.py."""

import json
import os
import shutil
import tarfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import io
from harness.convert.convert import Options, convert
from harness.errors import HarnessError
from harness.zero.reader import SavedEngine
from tests.support.helpers import assert_equal
from tests.support.old_deepspeed import FIXTURES, VERSIONS, run

NAMES = [f"zero{stage}_{dtype}" for stage in (1, 2, 3) for dtype in ("fp32", "bf16")]
CASES = [(version, name) for version in VERSIONS for name in NAMES] + [
    (version, "bf16_optimizer") for version in VERSIONS[2:]
]
Corpus = Callable[[str], Path]
SAFELY: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
"""Python 3.11.0 to 3.11.3 have no filters."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Where the checkpoints of a version are."""

    @cache
    def of(version: str) -> Path:
        directory = tmp_path_factory.mktemp(version)
        with tarfile.open(FIXTURES / f"{version}.tar.xz") as archive:
            archive.extractall(directory, **SAFELY)
        return directory

    return of


def has_frozen(version: str, name: str) -> bool:
    """DeepSpeed 0.8 does not save frozen parameters at ZeRO 3."""
    return not (version == "0.8.3" and name.startswith("zero3"))


@pytest.mark.parametrize(("version", "name"), CASES)
def test_weights_equal_those_of_that_versions_zero_to_fp32_and_of_its_engine(
    corpus: Corpus, tmp_path: Path, version: str, name: str
) -> None:
    directory = corpus(version)
    lines: list[str] = []
    convert(directory / name, tmp_path / "w.sft", Options(verify=True), lines.append)
    found = io.load(tmp_path / "w.sft")
    engine = torch.load(directory / f"{name}.live.pt")
    expected = {key: value.float() for key, value in engine["module"].items()} | engine["masters"]
    expected["head.weight"] = expected["embedding.weight"]
    if not has_frozen(version, name):
        del expected["frozen.weight"], expected["frozen.bias"]
        assert lines[1].startswith("note: skipped 'frozen.weight': a frozen parameter")
    reference = directory / f"{name}.fp32.pt"
    if reference.exists():
        expected |= {key: value.float() for key, value in torch.load(reference).items()}
    assert_equal(found, expected)


@pytest.mark.parametrize(
    ("version", "name"),
    [
        pytest.param(*case, marks=[] if number % 3 == 0 else pytest.mark.slow)
        for number, case in enumerate(CASES)
        if has_frozen(*case)
    ],
)
def test_a_checkpoint_written_for_other_ranks_has_the_same_weights_and_moments(
    corpus: Corpus, tmp_path: Path, version: str, name: str
) -> None:
    source, lines = corpus(version) / name, []
    stage = 3 if SavedEngine(next(source.glob("global_step*"))).stage < 3 else 2
    convert(source, tmp_path / "zero", Options(to_zero=stage, ranks=3), lines.append)
    for path, directory in (("old.sft", source), ("new.sft", tmp_path / "zero")):
        convert(directory, tmp_path / path, Options(what="all"), lines.append)
    assert_equal(io.load(tmp_path / "new.sft"), io.load(tmp_path / "old.sft"))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("version", VERSIONS)
def test_that_versions_engine_loads_what_is_written_for_it(
    corpus: Corpus, tmp_path: Path, version: str
) -> None:
    """Installs it, unless it is in the directory that $OLD_DEEPSPEED names."""
    jobs = []
    for name in NAMES:
        stage, dtype = int(name[4]), name.partition("_")[2]
        target = stage % 3 + 1
        if has_frozen(version, name):
            options = Options(to_zero=target, ranks=2)
            convert(corpus(version) / name, tmp_path / name, options, lambda _: None)
            live = corpus(version) / f"{name}.live.pt"
            jobs.append([str(tmp_path / name), str(live), target, dtype])
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    parent = Path(os.environ.get("OLD_DEEPSPEED", tmp_path / "installed"))
    run(version, parent, "old_load.py", tmp_path / "jobs.json")


def test_the_corpus_has_padding_ties_and_frozen_parameters(corpus: Corpus) -> None:
    """Without it, the other tests would prove nothing."""
    for version in VERSIONS:
        saved = SavedEngine(next((corpus(version) / "zero2_fp32").glob("global_step*")))
        assert [flat.padding for of_rank in saved.flats for flat in of_rank] == [0, 0, 2, 1]
        assert saved.shared == {"head.weight": "embedding.weight"}
        assert "frozen.weight" not in saved.shapes


def as_written_by(version: str, source: Path, dst: Path) -> Path:
    """A copy of a checkpoint without the keys that DeepSpeed did not write yet, from its sources:

    0.8.3 has no frozen and shared parameters; 0.6.7 no paddings of groups; 0.5.10 has the shapes
    in optim_states; 0.3.16 one partition count and one dict of shapes for all groups, and no names
    of buffers.
    """
    shutil.copytree(source, dst)
    age = ["0.8.3", "0.6.7", "0.5.10", "0.3.16"].index(version)
    shapes = None
    for path in sorted(dst.glob("*_states.pt")):
        tree: dict[str, Any] = torch.load(path, weights_only=False)
        for key in ("shared_params", "frozen_param_shapes", "frozen_param_fragments"):
            tree.pop(key, None)
        optimizer = tree.get("optimizer_state_dict")
        if age >= 1 and optimizer:
            optimizer.pop("group_paddings", None)
        if age >= 2:
            shapes = tree.pop("param_shapes", shapes)
            if age >= 3 and isinstance(shapes, list):
                (shapes,) = shapes
            if optimizer:
                tree["param_shapes"] = shapes
        if age >= 3:
            for key in ("buffer_names", "ds_version", "ds_config"):
                tree.pop(key, None)
            if optimizer:
                optimizer["partition_count"] = 2
        torch.save(tree, path)
    return dst


@pytest.mark.parametrize("version", ["0.8.3", "0.6.7", "0.5.10", "0.3.16"])
@pytest.mark.parametrize("stage", [2, 3])
def test_keys_that_older_versions_lack_are_not_needed(
    tmp_path: Path, version: str, stage: int
) -> None:
    new = FIXTURES.parent / "before/deepspeed_0195/checkpoints/step-00000004/net"
    if stage == 3:
        convert(new, tmp_path / "zero3", Options(to_zero=3, ranks=2), print)
        (new,) = (tmp_path / "zero3").glob("global_step*")
    old = as_written_by(version, new, tmp_path / "old")
    for name, source in (("new", new), ("old", old)):
        convert(source, tmp_path / f"{name}.sft", Options(what="all"), print)
    expected = io.load(tmp_path / "new.sft")
    assert_equal(io.load(tmp_path / "old.sft"), expected)
    if version == "0.3.16":
        with pytest.raises(HarnessError, match="has no ds_config"):
            convert(old, tmp_path / "zero", Options(to_zero=1, ranks=3), print)
        return
    convert(old, tmp_path / "zero", Options(to_zero=1, ranks=3), print)
    convert(tmp_path / "zero", tmp_path / "zero.sft", Options(what="all"), print)
    assert_equal(io.load(tmp_path / "zero.sft"), expected)
