"""Model FLOPs utilization: counted once, against a peak that is set here, as a CPU has none."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from harness.config import Config
from harness.health import phases
from harness.metrics import flops
from harness.metrics.flops import FlopMeter, peak
from harness.metrics.meters import StepNumbers
from harness.run import run_in_world
from harness.testing.pool import RankPool
from tests.support.helpers import losses, records, tiny_config
from tests.support.quick import quick


@dataclass
class Engine:
    name: str
    dtype: torch.dtype


ENGINE = Engine("net", torch.bfloat16)


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("Tesla V100-SXM2-32GB", 125),
        ("NVIDIA A10G", None),
        ("Some new card", None),
    ],
)
def test_peaks_are_found_by_the_names_that_torch_gives(device: str, tflops: float | None) -> None:
    assert peak(device) == (tflops and tflops * 1e12)


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> FlopMeter:
    meter = FlopMeter(is_compiled=False)
    monkeypatch.setattr(meter, "_peak", 1e6)
    return meter


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_what_is_computed_again_in_backward_does_not_count(
    meter: FlopMeter, is_checkpointed: bool
) -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8))
    batch = torch.randn(5, 8, requires_grad=True)
    listened: list[str] = []
    phases.listener = listened.append
    try:
        with meter.counting([ENGINE], 5, 5):
            phases.enter("forward")
            out = checkpoint(model, batch, use_reentrant=False) if is_checkpointed else model(batch)
            phases.enter("backward")
            out.sum().backward()
            phases.enter("step")
            torch.mm(torch.ones(9, 9), torch.ones(9, 9))  # an optimizer's
        assert listened == ["forward", "backward", "step"]
    finally:
        phases.listener = None
    # 6 FLOPs for each weight and token; twice the tokens on 1 rank in 0.1 s
    found = meter.utilization([ENGINE], StepNumbers({}, {}, 10, 10), 0.1)
    assert found == {"mfu": pytest.approx(6 * 2 * 8 * 32 * 10 / (0.1 * 1e6))}


def test_what_cannot_be_known_is_absent(meter: FlopMeter) -> None:
    step = StepNumbers({}, {}, 10, 10)
    assert meter.utilization([ENGINE], step, 0.1) == {}  # not counted
    with meter.counting([Engine("net", torch.float32)], 5, 5):
        torch.mm(torch.ones(9, 9), torch.ones(9, 9))
    assert meter.utilization([ENGINE], step, 0.1) == {}
    assert FlopMeter(is_compiled=False)._peak is None  # a CPU's


def run_with_peak(config: Config) -> None:
    """A run on devices whose peak is 1 GFLOP/s."""
    original = flops.FlopMeter.__init__

    def known(self: FlopMeter, is_compiled: bool) -> None:
        original(self, is_compiled)
        self._peak = 1e9

    flops.FlopMeter.__init__ = known
    try:
        run_in_world(config)
    finally:
        flops.FlopMeter.__init__ = original


@pytest.mark.parametrize("stage", quick([0, 1, 2, 3], 3))
def test_counting_changes_nothing_and_every_step_has_it(
    two_ranks: RankPool, tmp_path: Path, stage: int
) -> None:
    engine = {"ds_overrides": {"bf16": {"enabled": True}}}
    configs = [
        tiny_config(tmp_path / name, stage, engines={"net": engine})
        for name in ("plain", "counted")
    ]
    two_ranks.run(run_in_world, configs[0])
    two_ranks.run(run_with_peak, configs[1])
    assert losses(configs[0]) == losses(configs[1])
    assert not any("mfu" in record for record in records(configs[0]))
    # 4 products forward, as many for the weights, and 3 for their inputs; 6 numbers count as tokens
    forward = 2 * (6 * 16 + 16 * 16 + 16 * 16 + 16 * 3)
    per_sample = 3 * forward - 2 * 6 * 16
    for record in records(configs[1]):
        expected = per_sample * 8 / (record["step_time_s"] * 1e9 * 2)
        assert record["mfu"] == pytest.approx(expected, rel=1e-6)
