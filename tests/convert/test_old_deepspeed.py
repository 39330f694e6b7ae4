"""Checkpoints that every version of DeepSpeed since 0.8 wrote; tests/support/old_deepspeed.py."""

import tarfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from harness import io
from harness.convert.convert import Options, convert
from harness.zero.reader import SavedEngine
from tests.support.helpers import assert_equal
from tests.support.old_deepspeed import FIXTURES, VERSIONS

NAMES = [f"zero{stage}_{dtype}" for stage in (1, 2, 3) for dtype in ("fp32", "bf16")]
CASES = [(version, name) for version in VERSIONS for name in NAMES] + [
    (version, "bf16_optimizer") for version in VERSIONS[2:]
]
Corpus = Callable[[str], Path]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Where the checkpoints of a version are."""

    @cache
    def of(version: str) -> Path:
        directory = tmp_path_factory.mktemp(version)
        with tarfile.open(FIXTURES / f"{version}.tar.xz") as archive:
            archive.extractall(directory, filter="data")
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
        assert lines[0].startswith("note: skipped 'frozen.weight': a frozen parameter")
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


def test_the_corpus_has_padding_ties_and_frozen_parameters(corpus: Corpus) -> None:
    """Without it, the other tests would prove nothing."""
    for version in VERSIONS:
        saved = SavedEngine(next((corpus(version) / "zero2_fp32").glob("global_step*")))
        assert [flat.padding for of_rank in saved.flats for flat in of_rank] == [0, 0, 2, 1]
        assert saved.shared == {"head.weight": "embedding.weight"}
        assert "frozen.weight" not in saved.shapes
