"""A whole step (Engine, APOLLO, EMA, LoRA, offload, meter, bus) makes the host wait for the device
only where it must know whether the gradients are finite: in harness in fp32 at stage 0, else in
DeepSpeed. And it launches few kernels besides those of the model's forward and backward."""

import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from harness import devices, distributed
from harness.config import Config
from harness.engine.models import engine_settings
from harness.optim import Apollo
from harness.run import run_in_world
from harness.testing.pool import RankPool
from harness.trainer import Trainer
from harness.zero.startup import join
from tests.support.helpers import ROOT, tiny_config
from tests.support.waits import NOTICE, counted_launches, counted_waits

COUNTED = range(5, 7)
"""Steps after the first ones, and none of those in which changed buffers are searched for."""
PARAMETERS = 6 * 2 + 1
"""With gradients: LoRA's."""
OVERFLOW = {
    "deepspeed/runtime/utils.py:is_invalid_grad_norm": 2,
    "deepspeed/runtime/zero/stage_1_and_2.py:has_overflow": 1,
    "deepspeed/runtime/utils.py:has_overflow": 1,
    "deepspeed/runtime/utils.py:has_overflow_serial": PARAMETERS,
    "deepspeed/runtime/utils.py:get_weight_norm": 2,
}
"""DeepSpeed's waits: functions, and at most how often in a step."""

LAUNCHES = {"optim": 150, "metrics": 5, "offload": 4, "engine": 1, "zero": 4}
"""Kernels of a step, at most, by room of harness: for 6 matrices, 3 blocks and 2 metrics."""
OF_THE_HOST = {"data", "distributed"}
"""Rooms whose tensors are not on a device."""
OF_THE_USER = {"harness/task.py:feed", "harness/offload/checkpointing.py:repeat"}
"""Functions that run the model's own code."""


def config_of(directory: Path, stage: int, dtype: str) -> Config:
    texts = directory / "texts"
    for name in "ab":
        (texts / f"{name}.txt").parent.mkdir(parents=True, exist_ok=True)
        (texts / f"{name}.txt").write_text("A step waits for nothing. " * 40)
    args = {"path": str(texts), "seq_len": 16, "dim": 16, "layers": 3, "heads": 2}
    engine = {
        "ds_config": ROOT / f"ds_configs/zero{stage}.json",
        "ds_overrides": {"bf16": {"enabled": dtype == "bf16"}},
        "optimizer": {"name": "apollo", "rank": 2},
        "ema_decay": 0.9,
        "lora": {"targets": ".*qkv", "rank": 4},
    }
    return Config.model_validate(
        tiny_config(directory).model_dump()
        | {
            "run": {"name": "waits", "dir": directory, "steps": COUNTED.stop + 1},
            "task": {"path": str(ROOT / "launch/tasks/byte_lm.py"), "args": args},
            "engines": {"lm": engine},
            "optimizations": {"unsloth": True, "offload": {"budget": "all", "min_bytes": 0}},
        }
    )


def counts_of(config: Config) -> tuple[Counter[str], Counter[str]]:
    """The waits and the launches of the steps COUNTED."""
    waits, launches = Counter[str](), Counter[str]()
    step = Trainer.step

    def counted(trainer: Trainer) -> None:
        if trainer.engines.global_step not in COUNTED:
            return step(trainer)
        with counted_launches() as launched, counted_waits() as waited:
            step(trainer)
        waits.update(waited)
        launches.update(launched)
        return None

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(devices.LIMITS, "cpu", devices.LIMITS["cuda"])
        patch.setattr(Trainer, "step", counted)
        run_in_world(config)
    return waits, launches


def check(found: Counter[str], stage: int, dtype: str) -> None:
    ours = {place: count for place, count in found.items() if place.startswith("harness/")}
    assert all(place.startswith("harness/zero/norms.py:") for place in ours), ours
    assert sum(ours.values()) <= 2 * len(COUNTED), ours  # in place of DeepSpeed's own
    for place, count in (found - Counter(ours)).items():
        assert count <= OVERFLOW.get(place, 0) * len(COUNTED), (place, count)


def check_launches(found: Counter[str]) -> None:
    assert not any("clip_grad_norm_" in place for place in found), found  # 4 a parameter
    by_room: Counter[str] = Counter()
    for place, count in found.items():
        if place.startswith("harness/") and place not in OF_THE_USER:
            by_room[place.split("/")[1]] += count
    for room in by_room.keys() - OF_THE_HOST:
        assert by_room[room] <= LAUNCHES.get(room, 0) * len(COUNTED), (room, found)


def test_a_wait_in_harness_is_found() -> None:
    parameters = [torch.nn.Parameter(torch.ones(3, 2))]
    parameters[0].grad = torch.ones(3, 2)
    optimizer = Apollo(parameters, rank=1)
    optimizer.step()
    with counted_waits() as waits:
        optimizer.step()
    assert waits == {"harness/optim/apollo/lowrank.py:_mask": 1}  # on a CPU, where it is free


def test_on_a_gpu_waits_are_counted_by_torchs_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """And its notice about them, which says "synchronizing operations", is none."""

    def set_mode(mode: str) -> None:
        if mode == "warn":
            warnings.warn(f"{NOTICE} and not all synchronizing operations", stacklevel=2)

    def read_on_device() -> None:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=2)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with pytest.warns(UserWarning, match="another") as shown, counted_waits() as waits:
        read_on_device()
        read_on_device()
        warnings.warn("another one", stacklevel=2)
    assert list(waits.values()) == [2] and len(shown) == 1


@pytest.mark.parametrize("asked", [False, True])
def test_deepspeeds_timer_which_waits_twice_a_step_is_off(tmp_path: Path, asked: bool) -> None:
    engine = config_of(tmp_path, 2, "bf16").engines["lm"]
    if asked:
        timers = {"timers": {"throughput": {"enabled": True}}}
        engine = engine.model_copy(update={"ds_overrides": engine.ds_overrides | timers})
    assert engine_settings(engine, 1)["timers"]["throughput"]["enabled"] is asked


CASES = [(0, "fp32"), (3, "bf16")]
SLOW = [(0, "bf16"), (1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16"), (3, "fp32")]


@pytest.mark.parametrize(
    ("stage", "dtype"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_waits_of_a_step(two_ranks: RankPool, tmp_path: Path, stage: int, dtype: str) -> None:
    for waits, launches in two_ranks.run(counts_of, config_of(tmp_path, stage, dtype)):
        check(waits, stage, dtype)
        check_launches(launches)


@pytest.fixture(scope="module")
def gpu_world() -> Iterator[None]:
    distributed.init(60, join)
    yield
    distributed.shutdown()


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu_world")
@pytest.mark.parametrize(("stage", "dtype"), [*CASES, *SLOW])
def test_waits_of_a_step_on_a_gpu(tmp_path: Path, stage: int, dtype: str) -> None:
    waits, launches = counts_of(config_of(tmp_path, stage, dtype))
    check(waits, stage, dtype)
    check_launches(launches)
