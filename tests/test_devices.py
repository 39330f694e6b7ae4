"""Which device is computed on, and what follows from it: pinning, offloading, one GPU per rank."""

from typing import Any

import pytest
import torch

from harness import devices, distributed
from harness.checkpoint.snapshot import Snapshots
from harness.errors import ConfigError
from harness.offload.backends import CpuBackend, CudaBackend, default_backend


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine that seems to have one GPU."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    return monkeypatch


def test_with_ds_accelerator_cpu_a_gpu_is_left_alone(gpu: pytest.MonkeyPatch) -> None:
    assert devices.is_gpu_used() and distributed.device().type == "cuda"
    assert isinstance(default_backend(), CudaBackend)
    gpu.setenv("DS_ACCELERATOR", "cpu")
    assert not devices.is_gpu_used() and distributed.device().type == "cpu"
    assert isinstance(default_backend(), CpuBackend)


@pytest.mark.parametrize("rank", [0, 1])
def test_more_ranks_than_gpus_are_refused_on_every_rank(gpu: pytest.MonkeyPatch, rank: int) -> None:
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2)):
        gpu.setenv(name, str(value))
    gpu.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=rf"rank {rank} is one of 2 ranks on .* sees 1 GPU:"):
        distributed.init(1.0, join=lambda timeout: None)


def test_snapshots_pin_what_they_hold_and_unpin_what_they_drop(
    gpu: pytest.MonkeyPatch,
) -> None:
    pinned: dict[int, int] = {}

    class Runtime:
        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
            pinned[address] = size
            return 0

        def cudaHostUnregister(self, address: int) -> None:
            del pinned[address]

    gpu.setattr(devices, "_cudart", Runtime)
    snapshots = Snapshots()
    one: dict[str, Any] = {"a": torch.ones(3000), "b": torch.ones(0), "c": torch.ones(77)}
    snapshots.take(one)
    assert sorted(pinned.values()) == [4 * 77, 4 * 3000]  # not rounded to powers of two
    snapshots.take(one)
    copied = snapshots.take({"a": torch.ones(3000)})
    assert list(pinned.values()) == [4 * 3000]
    assert torch.equal(copied["a"], torch.ones(3000))
