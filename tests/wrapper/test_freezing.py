"""Frozen parameters, alone and in runs that resume at every ZeRO stage."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from harness.config import Config
from harness.errors import ConfigError
from harness.run import run_in_world
from harness.testing.pool import RankPool
from harness.wrapper import (
    freeze,
)
from tests.support.helpers import error_of, exported, losses, tiny_config
from tests.support.offload_models import same
from tests.support.quick import quick
from tests.tasks.tiny_task import Classifier

STAGES = [0, 1, 2, 3]


@pytest.mark.parametrize("stage", quick(STAGES, 1, 3))
def test_frozen_parameters_do_not_change_and_the_rest_resumes_exactly(
    two_ranks: RankPool, tmp_path: Path, stage: int, plain_runs: Callable[[int], Config]
) -> None:
    engines = {"net": {"frozen": ["middle", r"last\.bias"]}}
    whole = tiny_config(tmp_path / "whole", stage, engines=engines)
    two_ranks.run(run_in_world, whole)
    parts = [
        tiny_config(tmp_path / "cut", stage, engines=engines, run={"steps": n}) for n in (3, 6)
    ]
    for part in parts:
        two_ranks.run(run_in_world, part)
    first, last = exported(parts[0]), exported(parts[1])
    for name, tensor in last.items():
        is_frozen = name in {"middle.weight", "again.weight", "last.bias", "scale"}
        assert torch.equal(tensor, first[name]) == is_frozen, name
    assert same(list(last.values()), list(exported(whole).values()))
    assert losses(parts[1]) == losses(whole)
    assert losses(whole) != losses(plain_runs(stage))


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1), (0, 2)])
def test_frozen_parameters_are_resharded(
    two_ranks: RankPool, tmp_path: Path, before: int, after: int
) -> None:
    engines = {"net": {"frozen": ["middle", r"last\.bias"]}}
    whole = tiny_config(tmp_path / "whole", after, engines=engines)
    first = tiny_config(tmp_path / "cut", before, engines=engines, run={"steps": 3})
    rest = tiny_config(tmp_path / "cut", after, engines=engines)
    for config in (whole, first, rest):
        two_ranks.run(run_in_world, config)
    assert losses(rest) == pytest.approx(losses(whole), abs=1e-6)
    for name, tensor in exported(whole).items():
        torch.testing.assert_close(exported(rest)[name], tensor, atol=1e-6, rtol=0)


def test_the_error_names_the_engine(two_ranks: RankPool, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, engines={"net": {"frozen": ["frist"]}})
    for error in two_ranks.run(error_of, config):
        assert "engines.net: frozen: 'frist' matches no parameter (did you mean 'first'?)" in error


def test_a_frozen_pattern_that_matches_nothing_is_an_error() -> None:
    model = Classifier()
    with pytest.raises(
        ConfigError, match=r"'mid' matches no parameter .*; the model has: first\.weight"
    ):
        freeze(model, ["first", "mid"])
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert freeze(model, [r"again\.weight"]) == ["again.weight"]
    assert not model.middle.weight.requires_grad
