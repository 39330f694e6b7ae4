"""Optimizers and schedules by name, and what ZeRO does not let them do."""

import logging
import math
import sys
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from harness.config.engine_sections import OPTIMIZER_PACKAGES, OptimizerConfig, SchedulerConfig
from harness.errors import ConfigError
from harness.io import load
from harness.io.stored import read_tensor
from harness.optim import Apollo, ApolloMini
from harness.optim.build import build_optimizer
from harness.optim.scheduler import Schedule, build_scheduler
from harness.optim.zero_compatibility import check_zero
from harness.run import run_in_world
from harness.testing.pool import RankError, RankPool
from harness.zero.reader import SavedEngine
from tests.support.commanded import commanded
from tests.support.given_gradients import Given, engine_of, gradients_of
from tests.support.helpers import error_of, log_text, losses, records, tiny_config
from tests.support.quick import quick

dynamo: Any = torch._dynamo


def optimizer_config(**settings: Any) -> OptimizerConfig:
    return OptimizerConfig.model_validate(settings)


def built(**settings: Any) -> torch.optim.Optimizer:
    return build_optimizer(nn.Linear(24, 20), optimizer_config(**settings))


def test_apollo_gets_its_groups_and_its_settings() -> None:
    optimizer = built(name="apollo", rank=8, scale=4.0, betas=[0.8, 0.9], lr=0.5)
    assert type(optimizer) is Apollo
    low_rank, dense = optimizer.param_groups
    assert (low_rank["rank"], low_rank["param_names"]) == (8, ["weight"])
    assert (dense["rank"], dense["param_names"]) == (0, ["bias"])
    assert all(group["lr"] == 0.5 and group["scale"] == 4 for group in optimizer.param_groups)
    mini = built(name="apollo-mini")
    assert type(mini) is ApolloMini
    assert [mini.param_groups[0][key] for key in ("rank", "scale", "scale_type")] == [
        1,
        128.0,
        "tensor",
    ]
    frozen = nn.Linear(24, 20).requires_grad_(False)
    adamw = build_optimizer(nn.ModuleList([nn.Linear(24, 20), frozen]), optimizer_config())
    assert len(adamw.param_groups[0]["params"]) == 2


OFFLOADED = {"stage": 2, "offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("zero", "settings", "on_cpu", "on_gpu"),
    [
        ({"stage": 0}, {}, None, None),
        ({"stage": 2}, {}, True, None),
        (OFFLOADED, {}, True, True),
        (OFFLOADED, {"foreach": False}, None, None),
        (OFFLOADED, {"name": "torch.optim:AdamW"}, None, None),
    ],
)
def test_adamw_is_fused_where_it_steps_shards_in_host_memory(
    zero: dict[str, Any],
    settings: dict[str, Any],
    on_cpu: bool | None,
    on_gpu: bool | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for has_gpu, expected in ((False, on_cpu), (True, on_gpu)):
        monkeypatch.setattr("harness.optim.build.is_gpu_used", lambda has_gpu=has_gpu: has_gpu)
        config = optimizer_config(**settings)
        optimizer = build_optimizer(nn.Linear(4, 2), config, {"zero_optimization": zero})
        assert optimizer.param_groups[0]["fused"] is expected


def test_fused_adamw_is_torchs_other_one_but_for_last_bits() -> None:
    torch.manual_seed(0)
    start, given = torch.randn(5000), torch.randn(60, 5000)
    ends = []
    for is_fused in (True, False):
        weight = nn.Parameter(start.clone())
        optimizer = torch.optim.AdamW([weight], lr=1e-3, weight_decay=0.1, fused=is_fused)
        for gradient in given:
            weight.grad = gradient.clone()
            optimizer.step()
        ends.append(weight.detach())
    torch.testing.assert_close(*ends, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "apolo"}, "did you mean 'apollo'"),
        ({"name": "apollo", "scal": 1}, "unknown key 'scal' (did you mean 'scale'?)"),
        ({"name": "apollo-mini", "gama": 1}, "unknown key 'gama' (did you mean 'gamma'?)"),
        ({"name": "apollo", "gamma": 0.1}, "gamma = 0.1 is not valid"),
        ({"name": "adamw", "rank": 3}, "unknown key 'rank'"),
        ({"name": "torch.optim:Nothing"}, "Nothing"),
    ],
)
def test_invalid_settings_are_config_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        built(**settings)
    assert message in str(error.value)


@pytest.mark.parametrize("name", OPTIMIZER_PACKAGES)
def test_a_missing_package_is_a_config_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = OPTIMIZER_PACKAGES[name]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValidationError, match=f"not installed: pip install {package}"):
        optimizer_config(name=name)


ADAFACTOR = "keeps row and column means of each matrix"


@pytest.mark.parametrize(
    ("name", "deepspeed", "message"),
    [
        ("adafactor", {"zero_optimization": {"stage": 1}}, ADAFACTOR),
        ("schedulefree", {"zero_optimization": {"stage": 1}}, "use ZeRO stage 0 in fp32"),
        ("schedulefree", {"bf16": {"enabled": True}}, "use ZeRO stage 0 in fp32"),
        ("muon-deepspeed", {"zero_optimization": {"stage": 3}}, "reduce_scatter = false"),
        ("torch.optim:LBFGS", {}, "computes the loss several times a step"),
        ("torch.optim:SparseAdam", {}, "needs sparse gradients"),
        (
            "muon-deepspeed",
            {"zero_optimization": {"stage": 2}},
            r"\(to 1\): set gradient_clipping = 0",
        ),
        ("adamw", {"fp16": {"enabled": True}}, "fp16 at ZeRO stage 0: .* use stage 1"),
        (
            "apollo",
            {
                "zero_optimization": {
                    "stage": 3,
                    "offload_optimizer": {"device": "cpu", "ratio": 0.3},
                }
            },
            "offload_optimizer.ratio: found 0.3, expected 1.0",
        ),
    ],
)
def test_optimizers_that_zero_would_degrade_are_refused(
    name: str, deepspeed: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_zero(optimizer_config(name=name), deepspeed)


def test_optimizers_that_zero_does_not_degrade_are_accepted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    zero = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    for name in ("adamw", "apollo", "apollo-mini", "torch.optim:SGD", "torch.optim:RMSprop"):
        check_zero(optimizer_config(name=name), zero)
    check_zero(optimizer_config(name="adafactor"), {"zero_optimization": {"stage": 0}})
    assert not caplog.records
    for name in ("tests.tasks.reshard_task:TwoGroups", "torch.optim:Adafactor"):
        with caplog.at_level(logging.WARNING):
            check_zero(optimizer_config(name=name), zero)
        assert f"{name!r} is not known to be elementwise" in caplog.text


def with_muon(stage: int, clip: float) -> dict[str, Tensor] | str:
    """Three steps of Muon: the weights after them, or why it is refused."""
    dynamo.config.disable = True  # its kernels are compiled, which takes a minute
    shapes = {"matrix": (12, 8), "wide": (8, 16), "bias": (7,), "embedding": (6, 5)}
    model = Given(shapes)
    config = optimizer_config(name="muon-deepspeed", lr=0.02, adam_lr=1e-2, momentum=0.9)
    overrides = {
        "gradient_clipping": clip,
        "zero_optimization": {"stage": stage, "reduce_scatter": stage != 3},
    }
    try:
        check_zero(config, overrides)
    except ConfigError as error:
        return str(error)
    engine = engine_of(model, build_optimizer(model, config), stage, "fp32", overrides)
    for step in range(3):
        engine.backward(engine(gradients_of(step, shapes)))
        engine.step()
    found = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
            found[name] = parameter.detach().clone()
    engine.destroy()
    return found


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_muon_is_the_same_at_every_stage_or_refused(
    two_ranks: RankPool, stage: int, clip: float
) -> None:
    """Matrices take Muon's steps, the rest AdamW's. The gradients' norm is far above `clip`."""
    whole, _ = two_ranks.run(with_muon, 0, clip)
    for found in two_ranks.run(with_muon, stage, clip):
        if isinstance(found, str):
            assert clip and "set gradient_clipping = 0" in found
            continue
        for name, weight in found.items():
            assert torch.allclose(weight, whole[name], rtol=0, atol=1e-4), name
    start = dict(Given({"matrix": (12, 8), "wide": (8, 16), "bias": (7,)}).named_parameters())
    assert (whole["matrix"] - start["matrix"]).abs().max() > 1e-2
    assert (whole["bias"] - start["bias"]).abs().max() > 1e-2


def muon_config(directory: Path, stage: int, clip: float | None) -> Any:
    overrides = {} if clip is None else {"gradient_clipping": clip}
    engine = {
        "optimizer": {"name": "muon-deepspeed", "lr": 1e-2},
        "ds_overrides": overrides | {"zero_optimization": {"reduce_scatter": False}},
    }
    return tiny_config(
        directory, stage, engines={"net": engine}, run={"steps": 2}, control={"stdin": True}
    )


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_of_muon_that_would_clip_its_updates_is_refused(
    two_ranks: RankPool, tmp_path: Path, stage: int
) -> None:
    """The shipped configs clip to 1; and so may a live command."""
    for error in two_ranks.run(error_of, muon_config(tmp_path / "config", stage, None)):
        assert f"at ZeRO stage {stage} DeepSpeed clips its updates" in error
    live = muon_config(tmp_path / "live", stage, 0.0)
    two_ranks.run(commanded, live, "clip 1@1\n")
    assert "step 1: clip 1: failed: optimizer 'muon-deepspeed'" in log_text(live)
    assert len(records(live)) == 2


def factors(name: str, steps: int = 100, **args: float) -> list[float]:
    config = SchedulerConfig.model_validate({"name": name, **args})
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_scheduler(optimizer, Schedule(config, steps))
    found = []
    for _ in range(steps + 1):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


def test_one_cycle_is_torchs() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    torchs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=101, pct_start=0.31)
    # Theirs reaches its peak at 0.31 * 101 - 1 = 30.31 steps: with so few steps, nearly ours.
    for ours in factors("one-cycle"):
        assert ours == pytest.approx(torchs.get_last_lr()[0], abs=0.02)
        optimizer.step()
        if torchs.last_epoch < 100:
            torchs.step()
    found = factors("one-cycle", warmup=20)
    assert (found[0], found[20], found[100]) == pytest.approx((0.04, 1.0, 4e-6))


def test_noam_rises_linearly_and_decays_with_the_inverse_root() -> None:
    found = factors("noam", warmup=10)
    assert found[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert found[39] == pytest.approx(math.sqrt(10 / 40))
    with pytest.raises(ConfigError, match="expected a number >= 1"):
        factors("noam", warmup=0)


def test_warmup_stable_decay_has_three_parts() -> None:
    found = factors("warmup-stable-decay", warmup=10, decay=20, floor=0.1)
    assert found[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert found[10:81] == [1.0] * 71
    assert (found[90], found[100]) == pytest.approx((0.55, 0.1))
    assert factors("warmup-stable-decay")[:91] == [1.0] * 91


def apollo_config(
    directory: Path, stage: int, name: str, dtype: str, rank: int = 3, **overrides: Any
) -> Any:
    optimizer = {"name": name, "rank": rank if name == "apollo" else 1, "update_proj_gap": 2}
    engine = {
        "optimizer": optimizer | {"low_rank": "last.weight", "lr": 1e-2, "weight_decay": 0.1},
        "ds_overrides": {"bf16": {"enabled": dtype == "bf16"}},
    }
    return tiny_config(directory, stage, engines={"net": engine}, **overrides)


@pytest.mark.parametrize(
    ("stage", "dtype", "name"),
    quick(
        [
            (0, "bf16", "apollo"),
            (1, "fp32", "apollo-mini"),
            (2, "bf16", "apollo-mini"),
            (3, "fp32", "apollo"),
            *(
                (*layout, name)
                for layout in ((0, "fp32"), (3, "bf16"))
                for name in ("apollo", "apollo-mini")
            ),
        ],
        (2, "bf16", "apollo-mini"),
        (3, "fp32", "apollo"),
    ),
)
def test_a_resumed_run_is_bit_identical(
    two_ranks: RankPool, tmp_path: Path, name: str, stage: int, dtype: str
) -> None:
    """Saved after 3 of 6 steps, with P refreshed every 2."""
    whole = apollo_config(tmp_path / "whole", stage, name, dtype)
    two_ranks.run(run_in_world, whole)
    for steps in (3, 6):
        parts = apollo_config(tmp_path / "parts", stage, name, dtype, run={"steps": steps})
        two_ranks.run(run_in_world, parts)
    assert losses(parts) == losses(whole)
    assert len(set(losses(whole))) == 6
    for record in records(whole):
        assert 0 < record["apollo/scale"] < math.inf
        assert 0 <= record["apollo/limited"] <= 1
        assert record["apollo/skipped"] == 0


def test_another_rank_is_refused_before_the_first_step(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(run_in_world, apollo_config(tmp_path, 1, "apollo", "fp32", run={"steps": 3}))
    config = apollo_config(tmp_path, 1, "apollo", "fp32", rank=2, run={"steps": 6})
    message = (
        r"CheckpointError: engine 'net': optimizer.rank is 2 in the config, and 3 in the checkpoint"
    )
    with pytest.raises(RankError, match=message):
        two_ranks.run(run_in_world, config)
    assert len(records(config)) == 3


def test_schedule_free_exports_its_averages_and_resumes_bit_identically(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    """Lent to evaluations and exports, and taken back for the steps between them."""
    pytest.importorskip("schedulefree")
    overrides: dict[str, Any] = {
        "engines": {"net": {"optimizer": {"name": "schedulefree", "lr": 1e-2}}},
        "trainer": {"eval_every": 2, "save_every": 4, "export_every": 8},
    }
    whole, half, parts = (
        tiny_config(tmp_path / name, run={"steps": steps}, **overrides)
        for name, steps in (("whole", 8), ("parts", 4), ("parts", 8))
    )
    for config in (whole, half, parts):
        two_ranks.run(run_in_world, config)
    assert losses(whole) == losses(parts)
    evaluated = [[r["eval/loss"] for r in records(config, "eval/")] for config in (whole, parts)]
    assert evaluated[0] == evaluated[1]
    saved = SavedEngine(whole.run_dir / "checkpoints/step-00000008/net")
    exported = load(whole.run_dir / "exports/step-00000008/net.sft")
    for name in saved.shapes:
        stepped = read_tensor(saved.master(name))
        average = stepped.lerp(read_tensor(saved.moment(name, "z")), 1 - 1 / 0.9)
        assert torch.allclose(exported[name], average, rtol=0, atol=1e-6)
        assert not torch.allclose(exported[name], stepped, rtol=0, atol=1e-5)
