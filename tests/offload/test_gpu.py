"""Offloading on a GPU: real copy streams, pinned memory, and what is left on the device."""

import gc
import os
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from harness import offload
from harness.offload.backends import CudaBackend
from harness.offload.saved_tensor_hooks import WINDOW
from launch.tasks.byte_lm import ByteLM, ByteLMArgs

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS is not deterministic

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

ARGS = ByteLMArgs(seq_len=1024, dim=512, layers=8, heads=8, dropout=0.1)
BATCH = 4
INPUT_BYTES = BATCH * ARGS.seq_len * ARGS.dim * 2
"""Of one block, in bf16."""


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    with sdpa_kernel(SDPBackend.MATH):  # a recomputation needs the same kernel
        yield
    torch.use_deterministic_algorithms(False)


def build() -> ByteLM:
    torch.manual_seed(0)
    return ByteLM(ARGS).to("cuda", torch.bfloat16)


def checkpointed(model: ByteLM) -> ByteLM:
    """The model with plain checkpointing."""
    for block in model.blocks:
        plain = block.forward
        block.forward = lambda *args, plain=plain: checkpoint(  # pyright: ignore
            plain, *args, use_reentrant=False
        )
    return model


def attached(model: ByteLM, **settings: Any) -> offload.OffloadPlan:
    return offload.attach(model, **{"fraction": "all", "min_bytes": 0} | settings)


def loss_of(model: ByteLM, rows: int = BATCH, length: int = ARGS.seq_len) -> Tensor:
    bytes_BT = torch.randint(256, (rows, length), device="cuda")
    logits = model(bytes_BT).float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), bytes_BT.flatten())


def trained(model: ByteLM, steps: int) -> list[Tensor]:
    """Losses, weights and random generators after some steps of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    torch.manual_seed(1)
    losses = []
    for _ in range(steps):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().clone())
    states = [torch.cuda.get_rng_state(), torch.get_rng_state()]
    return [*losses, *(p.detach().clone() for p in model.parameters()), *states]


@pytest.mark.parametrize("settings", [{}, {"mode": "saved"}, {"fraction": 0.5}, {"keep_last": 0}])
def test_200_steps_are_bit_identical(settings: dict[str, Any]) -> None:
    expected = trained(checkpointed(build()), 200)
    model = build()
    plan = attached(model, **settings)
    found = trained(model, 200)
    assert all(map(torch.equal, found, expected))
    stats = plan.stats()
    assert stats.bytes_out > 0 and stats.bytes_in > 0
    assert plan.store.pool.leased == 0
    plan.detach()


def test_lengths_that_change_dropped_graphs_and_two_graphs_at_a_time() -> None:
    def run(model: ByteLM) -> list[Tensor]:
        torch.manual_seed(2)
        found = []
        for length in (1024, 96, 640, 1024, 320):
            model.zero_grad()
            loss_of(model, length=length)  # nobody wants this one
            first, second = loss_of(model, length=length), loss_of(model, length=length)
            first.backward(retain_graph=True)
            second.backward()
            first.backward()
            found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return found

    expected = run(checkpointed(build()))
    model = build()
    plan = attached(model, keep_last=0)
    assert all(map(torch.equal, run(model), expected))
    assert plan.store.pool.leased == 0
    plan.detach()


def test_prefetched_tensors_that_are_never_used() -> None:
    """What compute allocates next must not be what a copy back still writes to."""
    model = build()
    plan = attached(model, keep_last=0)
    for _ in range(20):
        x = torch.randn(BATCH, ARGS.seq_len, ARGS.dim, device="cuda", dtype=torch.bfloat16)
        angles = torch.randn(2, ARGS.seq_len, 32, device="cuda")
        middle = x
        for block in model.blocks[:4]:
            middle = block(middle, *angles)
        end = middle
        for block in model.blocks[4:]:
            end = block(end, *angles)
        torch.autograd.grad(end.float().square().mean(), middle)
        del middle, end, x
        fresh = [
            torch.zeros(INPUT_BYTES // 2, device="cuda", dtype=torch.bfloat16) for _ in range(4)
        ]
        torch.cuda.synchronize()
        assert all(not tensor.any() for tensor in fresh)
    plan.detach()


def resident(model: ByteLM) -> int:
    """Bytes that a forward leaves on the device until backward."""
    torch.manual_seed(3)
    gc.collect()
    before = torch.cuda.memory_allocated()
    loss = loss_of(model)
    torch.cuda.synchronize()
    found = torch.cuda.memory_allocated() - before
    loss.backward()
    model.zero_grad()
    return found


def test_block_inputs_leave_the_device() -> None:
    model = checkpointed(build())
    resident(model)  # the first time allocates workspaces as well
    expected = resident(model)
    model = build()
    plan = attached(model)
    resident(model)
    found = resident(model)
    offloaded = ARGS.layers - 1 - WINDOW
    assert expected - found >= 0.95 * offloaded * INPUT_BYTES
    plan.detach()


def test_memory_is_flat_over_500_steps() -> None:
    model = build()
    plan = attached(model)
    process = psutil.Process()

    def used_after(steps: int) -> tuple[int, int, int, int]:
        for step in range(steps):
            loss_of(model, length=(1024, 512, 768)[step % 3]).backward()
            model.zero_grad()
        torch.cuda.synchronize()
        pool = plan.store.pool
        return torch.cuda.memory_allocated(), pool.held, pool.pins, process.memory_info().rss

    *before, host = used_after(51)
    *after, host_after = used_after(450)
    assert after == before
    assert host_after - host < 64 << 20
    plan.detach()
    assert plan.store.pool.held == 0


def test_host_memory_is_pinned_and_copies_have_separate_streams() -> None:
    backend = CudaBackend()
    device = torch.device("cuda", torch.cuda.current_device())
    assert len({backend.compute(device), backend.out(device), backend.back(device)}) == 3
    memory = backend.pin(1 << 20)
    assert memory is not None and memory.is_pinned()
    backend.unpin(memory)
    assert not memory.is_pinned()


def test_a_failure_to_pin_is_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of a pinning that failed does not come out of the next kernel."""
    backend = CudaBackend()
    taken = backend.pin(1 << 20)
    assert taken is not None
    monkeypatch.setattr(torch, "frombuffer", lambda *args, **kwargs: taken)
    assert backend.pin(1 << 20) is None  # these pages are registered already
    assert torch.ones(3, device="cuda").sum().item() == 3
    monkeypatch.undo()
    backend.unpin(taken)


def test_auto_offloads_nothing_that_fits() -> None:
    model = build()
    plan = attached(model, fraction="auto")
    expected = trained(checkpointed(build()), 6)
    assert all(map(torch.equal, trained(model, 6), expected))
    before = plan.stats().bytes_out
    loss_of(model).backward()
    assert plan.planner.fraction == 0 and plan.stats().bytes_out == before
    plan.detach()
