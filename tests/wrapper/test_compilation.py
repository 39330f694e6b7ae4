"""Models that are compiled, completely or by blocks."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from harness.config import Config
from harness.errors import ConfigError
from harness.run import run_in_world
from harness.testing.pool import RankPool
from harness.wrapper import (
    compile_model,
)
from tests.support.helpers import exported, losses, tiny_config
from tests.support.offload_models import Model, step
from tests.tasks.tiny_task import Classifier


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [False, True])
def test_a_compiled_model_keeps_its_names_and_computes_the_same(blocks: bool) -> None:
    plain = Model(blocks=2).eval()
    model = copy.deepcopy(plain)
    compile_model(model, blocks=blocks)
    assert list(model.state_dict()) == list(plain.state_dict())
    compiled = [n for n, m in model.named_modules() if m._compiled_call_impl is not None]
    assert compiled == (["blocks.0", "blocks.1"] if blocks else [""])
    for found, expected in zip(step(model), step(plain), strict=True):
        torch.testing.assert_close(found, expected)


def test_what_cannot_be_compiled_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Classifier has no nn\.ModuleList"):
        compile_model(Classifier(), blocks=True)
    with pytest.raises(ValidationError, match="engine 'net' is at ZeRO stage 3"):
        tiny_config(tmp_path, 3, optimizations={"compile": "blocks"})


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_compiled_run_has_the_same_losses(
    tmp_path: Path, plain_runs: Callable[[int], Config], stage: int
) -> None:
    config = tiny_config(tmp_path, stage, optimizations={"compile": True})
    with RankPool(2, timeout_s=300) as pool:
        pool.run(run_in_world, config)
    assert losses(config) == pytest.approx(losses(plain_runs(stage)), abs=1e-6)
    assert list(exported(config)) == list(exported(plain_runs(stage)))
