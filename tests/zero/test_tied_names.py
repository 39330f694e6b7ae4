"""Names of one tensor: every one of them converts, is resharded and loaded like the live model."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from harness import io
from harness.convert.convert import Options, convert
from harness.zero.reader import SavedEngine
from tests.support import tied_models
from tests.support.helpers import Pools, assert_equal, assert_same_optimizer

QUICK = [(0, 2, 0, "bf16"), (1, 2, 1, "bf16"), (2, 2, 2, "fp32"), (3, 2, 3, "bf16")]
FUZZ = [
    pytest.param(4 * seed + 24 * seed + stage, ranks, stage, dtype, marks=pytest.mark.slow)
    for seed in range(1, 5)
    for ranks in (1, 2, 3)
    for stage in (0, 1, 2, 3)
    for dtype in ("fp32", "bf16")
]


def places(tensors: dict[str, Tensor], known: dict[str, Tensor]) -> set[frozenset[str]]:
    """The names that share memory, of parameters that have several."""
    names: dict[int, set[str]] = {}
    for name in known:
        names.setdefault(tensors[name].data_ptr(), set()).add(name)
    return {frozenset(tied) for tied in names.values() if len(tied) > 1}


@pytest.mark.parametrize(("seed", "ranks", "stage", "dtype"), QUICK + FUZZ)
def test_they_agree_with_the_live_model(
    pools: Pools, tmp_path: Path, seed: int, ranks: int, stage: int, dtype: str
) -> None:
    source = tmp_path / "source"
    pools(ranks).run(tied_models.write, source, seed, stage, dtype)
    live, masters = (torch.load(source / name) for name in ("live.pt", "masters.pt"))
    for path, options, expected in (
        (tmp_path / "keep.sft", Options(dtype="keep", verify=True), live),
        (tmp_path / "fp32.sft", Options(verify=True), masters),
    ):
        convert(source, path, options, print)
        assert_equal(io.load(path), expected)
    assert places(io.load(tmp_path / "fp32.sft"), masters) == places(masters, masters)
    if not stage:  # without names of the masters
        return
    for now, new_ranks in ((stage % 3 + 1, 3), ((stage + 1) % 3 + 1, 1)):
        directory = tmp_path / f"zero{now}"
        convert(source, directory, Options(to_zero=now, ranks=new_ranks), print)
        assert_same_optimizer(SavedEngine(directory / "global_step2"), SavedEngine(source / "here"))
        convert(directory, tmp_path / "again.sft", Options(verify=True), print)
        assert_equal(io.load(tmp_path / "again.sft"), masters)
        for found in pools(new_ranks).run(tied_models.load, directory, seed, now, dtype):
            assert_equal(found[0], live)
            assert_equal(found[1], masters)
