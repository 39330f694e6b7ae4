"""A step whose gradients are not finite changes nothing, at every stage, and is counted."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.config import Config
from harness.config.engine_sections import SchedulerConfig
from harness.optim.scheduler import Schedule, build_scheduler
from harness.run import run_in_world
from harness.testing.pool import RankPool
from tests.support.helpers import ROOT, log_text, records, tiny_config
from tests.support.small_loop import engines_of, train, weights_of

SCHEDULE = {"name": "linear", "warmup": 2}
BAD = {1, 3}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batches() -> list[Tensor]:
    """Of five steps; two have a NaN, among the samples of the last rank."""
    found = list(torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(1)))
    for step in BAD:
        found[step][-1, 0] = torch.nan
    return found


def feed(engine: Any, batch: Tensor) -> tuple[Tensor, dict[str, Any]]:
    return engine(batch.to(engine.dtype)).float().square().mean(), {}


def skipping(stage: int, dtype: str) -> dict[str, Any]:
    """Learning rates, whether a step was applied, and what is left after five steps."""
    ds = {"gradient_clipping": 1.0, "bf16": {"enabled": dtype == "bf16"}}
    engines = engines_of(model(), feed, stage, ds, scheduler=SCHEDULE)
    engine = engines["net"]
    rates, applied, norms = [], [], []
    for batch in batches():
        train(engines, [batch])
        rates.append(engine.last_lrs["lr"])
        applied.append(engine.was_step_applied())
        norms.append(float(engine.last_grad_norm))
    engine.largest_norm = norms[-1] / 1e3
    before = weights_of(engines)
    train(engines, [batches()[0]])
    assert (engine.last_skip, engine.was_step_applied()) == ("spike", False)
    assert 0 < float(engine.last_grad_norm) < math.inf
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(engines).items())
    found = {"rates": rates, "applied": applied, "norms": norms, "weights": weights_of(engines)}
    found |= {"skipped": (engine.counters.skipped, engine.ds.skipped_steps)}
    found |= {"steps": (engine.counters.global_step, engine.ds.global_steps)}
    engines.close()
    return found


def plain() -> dict[str, Any]:
    """The same in plain PyTorch."""
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
    scheduler = build_scheduler(optimizer, Schedule(SchedulerConfig.model_validate(SCHEDULE), 6))
    rates, applied = [], []
    for batch in batches():
        optimizer.zero_grad()
        net(batch).square().mean().backward()
        rates.append(scheduler.get_last_lr()[0])
        norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        applied.append(bool(norm.isfinite()))
        if applied[-1]:
            optimizer.step()
            scheduler.step()
    return {"rates": rates, "applied": applied, "weights": net.state_dict()}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_all_layouts_skip_the_same_steps(two_ranks: RankPool, stage: int, dtype: str) -> None:
    expected = plain()
    assert expected["applied"] == [step not in BAD for step in range(5)]
    for found in two_ranks.run(skipping, stage, dtype):
        assert found["applied"] == expected["applied"]
        assert found["rates"] == pytest.approx(expected["rates"])
        assert found["skipped"] == (3, 3)
        assert found["steps"] == (6, 6)
        assert [norm == float("inf") for norm in found["norms"]] == [
            step in BAD for step in range(5)
        ]
        tolerance = 1e-6 if dtype == "fp32" else 2e-2
        for name, weight in expected["weights"].items():
            assert torch.allclose(found["weights"][name].float(), weight, rtol=0, atol=tolerance)


def feed_pair(engine: Any, batch: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """D trains on the batch; G's loss goes through D, whose statistics it changes."""
    if engine.name == "D":
        return engine(batch.nan_to_num()).square().mean(), {}
    with engine.peers.lend("D") as model:
        return model(engine(batch)).square().mean(), {}


def statistics_of(names: str, stage: int) -> list[Tensor]:
    """Of D's BatchNorm, after each of three steps."""
    torch.manual_seed(0)
    models = {
        "D": nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)),
        "G": nn.Sequential(nn.Linear(6, 6), nn.Tanh()),
    }
    engines = engines_of({name: models[name] for name in names}, feed_pair, stage)
    found = []
    for batch in batches()[1:4]:  # the first and the last with NaN
        train(engines, [batch])
        module: Any = engines["D"].module
        found.append(module[1].running_mean.clone())
    assert engines["D"].counters.skipped == 0
    engines.close()
    return found


@pytest.mark.parametrize("stage", [0, 3])
def test_a_skipped_step_restores_what_it_has_changed_in_a_lent_model(
    two_ranks: RankPool, stage: int
) -> None:
    """What the other engine's own step has changed stays."""
    for alone, both in zip(
        two_ranks.run(statistics_of, "D", stage),
        two_ranks.run(statistics_of, "DG", stage),
        strict=True,
    ):
        assert torch.equal(alone[0], both[0])
        assert all(mean.isfinite().all() for mean in both)
        assert not torch.equal(alone[1], both[1])


class LateMean(nn.Linear):
    """A layer whose running mean begins with the fourth step."""

    def __init__(self) -> None:
        super().__init__(6, 3)
        self.calls = 0
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        if self.calls >= 4:
            self.mean += input.detach().mean(0)
        return super().forward(input)


def late_means() -> list[Tensor]:
    """After each of five steps."""
    engines = engines_of(LateMean(), feed, 0)
    found = []
    for batch in batches():
        engines.sync_buffers()
        train(engines, [batch])
        found.append(engines["net"].module.get_buffer("mean").clone())
    engines.close()
    return found


def test_a_skipped_step_restores_what_is_first_changed_in_it(two_ranks: RankPool) -> None:
    for means in two_ranks.run(late_means):
        assert all(torch.equal(mean, torch.zeros(6)) for mean in means[:4])
        assert means[4].isfinite().all() and means[4].any()


def nan_config(directory: Path, steps: int) -> Config:
    task = {"path": str(ROOT / "tests/tasks/nan_task.py"), "args": {"steps": [2, 5]}}
    return tiny_config(directory, 0, task=task, run={"steps": steps})


def test_they_are_logged_recorded_and_saved(two_ranks: RankPool, tmp_path: Path) -> None:
    for steps in (3, 6):
        config = nan_config(tmp_path, steps)
        two_ranks.run(run_in_world, config)
    assert [record["skipped"] for record in records(config)] == [0, 1, 1, 1, 2, 2]
    message = "engine net: skipped, as its gradients are not finite"
    assert f"step 2: {message} (1 so far)" in log_text(config)
    assert f"step 5: {message} (2 so far)" in log_text(config)
