"""Which device is computed on, and what follows from it: pinning, offloading, one GPU per rank."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from harness import devices, distributed
from harness.checkpoint.save import step_back
from harness.checkpoint.snapshot import Snapshots
from harness.errors import ConfigError
from harness.offload.backends import CpuBackend, CudaBackend, default_backend
from harness.process_state import restored


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


def test_the_suite_computes_on_cpus_on_a_machine_with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also below DeepSpeed's launcher, which sets CUDA_VISIBLE_DEVICES anew."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert distributed.device().type == "cpu"


@pytest.mark.parametrize("rank", [0, 1])
def test_more_ranks_than_gpus_are_refused_on_every_rank(gpu: pytest.MonkeyPatch, rank: int) -> None:
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2)):
        gpu.setenv(name, str(value))
    gpu.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=rf"rank {rank} is one of 2 ranks on .* sees 1 GPU:"):
        distributed.init(1.0, join=lambda timeout: None)


@pytest.mark.parametrize("begin", [distributed.use_device, step_back])
def test_a_thread_uses_the_gpu_of_its_rank(gpu: pytest.MonkeyPatch, begin: Any) -> None:
    """It begins with GPU 0, where it would make a context: 500 MB, for each rank of the node."""
    gpu.setenv("LOCAL_RANK", "3")
    used: list[tuple[str, torch.device]] = []

    def use(device: torch.device) -> None:
        used.append((threading.current_thread().name, device))

    gpu.setattr(torch.cuda, "set_device", use)
    with ThreadPoolExecutor(1, "save", initializer=begin) as thread:
        thread.submit(int).result()
    assert used == [("save_0", torch.device("cuda", 3))]


def test_after_a_run_the_gpu_and_its_generator_are_those_of_before(
    gpu: pytest.MonkeyPatch,
) -> None:
    current, generators = [2], {2: "before", 5: "other"}

    def set_device(device: int) -> None:
        current[0] = device

    def set_state(state: str) -> None:
        generators[current[0]] = state

    gpu.setattr(torch.cuda, "is_initialized", lambda: True)
    gpu.setattr(torch.cuda, "current_device", lambda: current[0])
    gpu.setattr(torch.cuda, "set_device", set_device)
    gpu.setattr(torch.cuda, "get_rng_state", lambda: generators[current[0]])
    gpu.setattr(torch.cuda, "set_rng_state", set_state)
    gpu.setattr(torch.cuda, "empty_cache", lambda: None)
    with restored():
        torch.cuda.set_device(5)
        generators.update({2: "changed", 5: "of the run"})
    assert current == [2] and generators == {2: "before", 5: "of the run"}


class Runtime:
    """CUDA's, that pins so many bytes. Its error of a call is that of the next kernel as well."""

    def __init__(self, most: int = 10**9):
        self.most = most
        self.pinned: dict[int, int] = {}
        self.errors: list[str] = []

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if address in self.pinned or sum(self.pinned.values()) + size > self.most:
            return 712
        self.pinned[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        if self.pinned.pop(address, None) is None:
            self.errors.append("part or all of the requested memory range is not registered")
        return 713 * bool(self.errors)


def test_snapshots_pin_what_they_hold_and_unpin_what_they_drop(
    gpu: pytest.MonkeyPatch,
) -> None:
    runtime = Runtime()
    pinned = runtime.pinned
    gpu.setattr(devices, "_cudart", lambda: runtime)
    snapshots = Snapshots()
    one: dict[str, Any] = {"a": torch.ones(3000), "b": torch.ones(0), "c": torch.ones(77)}
    snapshots.take(one)
    assert sorted(pinned.values()) == [4 * 77, 4 * 3000]  # not rounded to powers of two
    snapshots.take(one)
    copied = snapshots.take({"a": torch.ones(3000)})
    assert list(pinned.values()) == [4 * 3000]
    assert torch.equal(copied["a"], torch.ones(3000))
    del snapshots  # a run has ended, in a program that goes on
    assert not pinned and not runtime.errors
    assert torch.equal(copied["a"], torch.ones(3000))


def test_memory_that_could_not_be_pinned_is_not_unpinned(gpu: pytest.MonkeyPatch) -> None:
    runtime = Runtime(most=500)
    gpu.setattr(devices, "_cudart", lambda: runtime)
    gpu.setattr(devices, "_forget_error", lambda: None)
    snapshots = Snapshots()
    snapshots.take({"a": torch.ones(3000), "c": torch.ones(77)})
    assert list(runtime.pinned.values()) == [4 * 77]
    copied = snapshots.take({"b": torch.ones(55)})
    assert not runtime.errors and torch.equal(copied["b"], torch.ones(55))
