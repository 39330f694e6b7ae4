"""Models that are built by functions: at ZeRO stage 3 in shards, with the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness.config import Config
from harness.run import run_in_world
from harness.task import default_feeder
from harness.testing.pool import RankPool
from tests.support.helpers import (
    OFFLOAD,
    ROOT,
    assert_equal,
    error_of,
    exported,
    exports,
    losses,
    tiny_config,
)
from tests.support.quick import quick
from tests.support.small_loop import engines_of, weights_of

BF16 = {"bf16": {"enabled": True}}
SAME = {"what": "torch.nn:Linear", "by": "tests.tasks.function_task:Same", "include": "first"}
APOLLO = {"name": "apollo", "lr": 1e-2, "rank": 2}
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "stage 0": (0, {}, {}),
    "stage 2, bf16": (2, BF16, {}),
    "stage 3": (3, {}, {"frozen": ["first"], "ema_decay": 0.9}),
    "stage 3, bf16, LoRA": (3, BF16, {"lora": {"targets": "blocks.*up"}}),
    "stage 3, replaced": (3, BF16, {"optimizer": APOLLO}),
    "stage 3, Muon": (
        3,
        {"gradient_clipping": 0.0, "zero_optimization": {"reduce_scatter": False}},
        {"optimizer": {"name": "muon-deepspeed", "lr": 1e-2}},
    ),
    "stage 3, offload": (3, OFFLOAD, {}),
}


def function_config(directory: Path, case: str, **args: Any) -> Config:
    stage, ds, engine = CASES[case]
    zero = {"stage3_param_persistence_threshold": 0, **ds.get("zero_optimization", {})}
    return tiny_config(
        directory,
        stage,
        run={"steps": 2},
        task={"path": str(ROOT / "tests/tasks/function_task.py"), "args": args},
        engines={"net": {"ds_overrides": {**ds, "zero_optimization": zero}, **engine}},
        optimizations={"replace": [SAME] if case == "stage 3, replaced" else []},
    )


@pytest.mark.parametrize(
    "case",
    quick(CASES, "stage 2, bf16", "stage 3", "stage 3, bf16, LoRA", "stage 3, replaced"),
)
def test_a_function_builds_the_same_model(two_ranks: RankPool, tmp_path: Path, case: str) -> None:
    plain = function_config(tmp_path / "plain", case, function=False)
    built = function_config(tmp_path / "built", case, function=True)
    for config in (plain, built):
        two_ranks.run(run_in_world, config)
    assert losses(built) == losses(plain)
    assert_equal(exported(built), exported(plain))
    if "LoRA" not in case:
        engine = built.engines["net"].model_copy(update={"init_from": exports(plain)})
        again = built.model_copy(update={"engines": {"net": engine}})
        run = again.run.model_copy(update={"dir": tmp_path / "again"})
        two_ranks.run(run_in_world, again.model_copy(update={"run": run}))


def parameters_of(config: Config) -> tuple[int, int, int]:
    """Of a model built by a function: elements in all, on this rank, and of their type's bytes."""
    from harness.engine.models import build_models
    from harness.zero.parameters import full_numel, shard
    from tests.tasks.function_task import Model

    model = build_models({"net": Model}, config)["net"]
    shards = [shard(p) for p in model.parameters()]
    own = [s for s in shards if s is not None]
    assert len(own) == len(shards) and all(p.numel() == 0 for p in model.parameters())
    return sum(map(full_numel, model.parameters())), sum(s.numel() for s in own), own[0].itemsize


def test_a_rank_holds_its_shards_only(two_ranks: RankPool, tmp_path: Path) -> None:
    config = function_config(tmp_path, "stage 3, bf16, LoRA", function=True)
    for full, own, itemsize in two_ranks.run(parameters_of, config):
        assert full / 2 <= own < full / 2 + 40 and itemsize == torch.bfloat16.itemsize


class NotContiguous(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(3, 5).T)
        self.inner = nn.Conv2d(2, 3, 2)
        weight = self.inner.weight
        weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def weights_at(stage: int) -> dict[str, Any]:
    engines = engines_of({"net": NotContiguous}, default_feeder, stage)
    found = weights_of(engines)
    engines.close()
    return found


def test_a_function_may_build_weights_that_are_not_contiguous(two_ranks: RankPool) -> None:
    complete, gathered = two_ranks.run(weights_at, 0)[0], two_ranks.run(weights_at, 3)[0]
    assert_equal(gathered, complete)


def test_a_function_that_fails_is_an_error(two_ranks: RankPool, tmp_path: Path) -> None:
    for case in ("stage 0", "stage 3"):
        errors = two_ranks.run(error_of, function_config(tmp_path, case, fails=True))
        for error in errors:
            assert error.startswith("model 'net': its function failed:\n")
            assert "RuntimeError" in error


def lose_a_rank() -> nn.Module:
    raise RuntimeError("[/w/gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer")


def test_a_function_that_loses_a_rank_is_no_error_of_the_task(tmp_path: Path) -> None:
    """As in a collective of ZeRO 3: another rank has failed, and a restart may help."""
    from harness.engine.models import build_models

    with pytest.raises(RuntimeError, match=r"pair\.cc"):
        build_models({"net": lose_a_rank}, function_config(tmp_path, "stage 0"))
