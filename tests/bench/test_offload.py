"""The GPU part of bench/offload.py on a CPU, where long sequences do not fit."""

from functools import partial
from typing import Any

import pytest
import torch
from torch.autograd.graph import save_on_cpu

from bench import offload
from launch.tasks.byte_lm import Block

LONG = 20


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "DEVICE", "cpu")
    monkeypatch.setattr(offload, "SHAPES", {"tiny": (16, 3, 2)})
    monkeypatch.setattr(offload, "save_on_cpu", lambda pin_memory: save_on_cpu())
    monkeypatch.setattr(offload, "deepspeed_offload", offload.plain)  # it has streams of its own
    for name, value in {"get_device_name": "none", "max_memory_allocated": 2 * 10**9}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)


WAYS = {
    "checkpoint": offload.checkpointed,
    "save_on_cpu": offload.on_host,
    "offload": partial(offload.offloaded, settings={}, stats=print),
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", WAYS)
def test_a_way_that_does_not_fit_leaves_the_model_as_it_was(name: str) -> None:
    model = offload.Blocks(16, 3, 2)
    before = model.call
    with pytest.raises(torch.OutOfMemoryError), WAYS[name](model):
        raise torch.OutOfMemoryError
    assert model.call is before and type(model.blocks[0]) is Block


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_a_sequence_that_does_not_fit_changes_no_other_measurement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forward, calls = offload.Blocks.forward, set[tuple[Any, bool]]()

    def forward_of_short(self: offload.Blocks, x: torch.Tensor) -> torch.Tensor:
        is_offloaded = type(self.blocks[0]) is not Block
        calls.add((isinstance(self.call, partial), is_offloaded))
        if x.shape[1] > LONG:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, x)

    monkeypatch.setattr(offload.Blocks, "forward", forward_of_short)
    said: list[str] = []
    monkeypatch.setattr(offload, "say", said.append)
    monkeypatch.setattr(offload, "longest", partial(offload.longest, grain=8))
    offload.on_gpu("tiny", [8, 32], rounds=1, most=64)
    lines = "".join(said).splitlines()
    assert [line for line in lines if line.endswith("does not fit")] == [
        f"32 {way}: does not fit"
        for way in ("plain", "checkpoint", "save_on_cpu", "deepspeed", "offload", "offload saved")
    ]
    assert sum("longest sequence" in line and line.endswith(": 16") for line in lines) == 6
    assert "8 offload: peak 2.00 GB" in "".join(lines)
    # Plain, checkpointed, offloaded; never checkpointed in an offloaded block.
    assert calls == {(False, False), (True, False), (False, True)}
