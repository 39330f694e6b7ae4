"""The meter on a GPU, without one: what it launches, that it waits for nothing, and how a step is
timed."""

import pytest
import torch

from harness import distributed, waiting
from harness.health import phases
from harness.metrics import step_clock
from harness.metrics.meters import StepMeter
from harness.metrics.step_clock import StepClock
from harness.waiting import waits
from tests.support.fake_cuda import Launches, fake_cuda


@pytest.mark.parametrize("numbers", [0, 6, 26])
def test_a_step_waits_for_nothing(numbers: int) -> None:
    """What a task reports in two micro-batches, on the device, as vectors and as numbers of the
    host like offload's; and what the engine adds at the step's end."""
    meter = StepMeter()
    with fake_cuda(), Launches() as launches:
        for weight in (0.25, 0.75):
            report: dict[str, torch.Tensor | float] = {
                f"task/{n}": torch.empty((), device="cuda") for n in range(6)
            }
            report |= {"bf16": torch.empty((), device="cuda", dtype=torch.bfloat16)}
            report |= {"vector": torch.empty(5, device="cuda")}
            meter.add(report | {f"offload/{n}": 1.0 for n in range(numbers)}, weight)
        meter.add({"grad_norm": torch.empty((), device="cuda"), "skipped": 1.0})
        meter._sums.copy_to_host()
    assert launches.waits == []
    assert launches.total <= 32, launches.kernels


def test_a_blocking_copy_is_found() -> None:
    """That the count above would be of any use."""
    with fake_cuda(), Launches() as launches:
        device = torch.empty(3, device="cuda")
        device.copy_(torch.ones(3))
        torch.ones(3).to("cuda:0")
        device.to("cpu")
        torch.ones(3).to("cuda:0", non_blocking=True)
    assert launches.waits == ["copy_", "_to_copy", "_to_copy"]


def test_a_step_lasts_as_long_as_the_device_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host has long enqueued the step when the device begins it."""
    device_ms = [1000.0]

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = device_ms[0]

        def elapsed_time(self, other: "Event") -> float:
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cuda", 0))
    clock = StepClock()
    for phase in ("data", "forward", "backward", "step", "data", "forward", "backward", "step"):
        phases.enter(phase)
        device_ms[0] += 10 * len(phase)
        if phase == "backward":
            waits(device_ms.copy)()  # a collective is enqueued
    clock.stop()
    phases.enter("save")  # after the step
    device_ms[0] += 1000
    assert clock.seconds() == 0.46
    assert clock.by_phase == {"step": 0.08, "data": 0.08, "forward": 0.14, "backward": 0.16}
    assert clock.alone() == [0.08, 0.14, 0.16, 0.08]
    assert clock.waits_unseen() == {"backward"}


def test_on_a_cpu_a_step_lasts_as_long_as_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    for module in (step_clock.time, waiting):
        monkeypatch.setattr(module, "perf_counter", lambda: now[0])
    clock = StepClock()
    for phase in ("data", "forward", "backward", "step"):
        phases.enter(phase)
        now[0] += 1
        if phase in ("backward", "step"):
            reduce = waits(lambda: now.insert(0, now[0] + 4))
            waits(reduce)()  # one in the other is counted once
    clock.stop()
    now[0] += 1
    assert clock.seconds() == 12
    assert clock.by_phase == {"step": 5, "data": 1, "forward": 1, "backward": 5}
    assert clock.alone() == [1, 1, 1, 1]
    assert clock.waits_unseen() == ()
