"""The pool of host memory, and the planner that decides how much to use it."""

import gc
import itertools
import random
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness import offload
from harness.offload.backends import CpuBackend
from harness.offload.host_memory import available_host_memory
from harness.offload.planner import WARM_UP, Planner
from harness.offload.pool import PAGE, Pool, Slab, size_class
from harness.testing.sim import SimBackend
from tests.support.offload_models import WIDTH, Model, one_thread, same, step

MB = 1 << 20


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    torch.manual_seed(0)
    with one_thread():
        yield


@given(st.integers(1, 1 << 45))
def test_size_classes_waste_an_eighth_at_most(size: int) -> None:
    given_ = size_class(size)
    assert given_ >= size and given_ % PAGE == 0 and size_class(given_) == given_
    assert given_ - size <= max(PAGE - 1, size / 8)


def one_step(pool: Pool, size: int, blocks: int = 16) -> int:
    """Leases as a forward does, and gives back as a backward does. How many leases were refused."""
    slabs = [pool.lease(size) for _ in range(blocks)]
    assert pool.held <= pool.host_bytes
    for slab in reversed(slabs):
        if slab is not None:
            assert slab.size >= size
            pool.give_back(slab)
    return slabs.count(None)


@pytest.mark.parametrize("order", ["ascending", "descending", "random"])
def test_forty_lengths_never_pin_twice(order: str) -> None:
    lengths = [PAGE * 3 * n for n in range(11, 51)]
    lengths.sort(reverse=order == "descending")
    if order == "random":
        random.Random(0).shuffle(lengths)
    pool = Pool(CpuBackend(), 64 * size_class(max(lengths)))  # no need to grow so far
    assert sum(one_step(pool, length) for length in lengths) == 0
    pins = pool.pins
    random.Random(1).shuffle(lengths)
    assert sum(one_step(pool, length) for length in lengths) == 0
    assert pool.pins == pins
    assert pool.held == 16 * size_class(max(lengths))  # not the sum over all lengths
    if order == "descending":
        assert pins == 16


def test_repeated_demands_pin_nothing() -> None:
    draw = random.Random(0)
    pool = Pool(CpuBackend(), 1 << 30)
    steps = [[draw.randrange(1, 300) * PAGE for _ in range(12)] for _ in range(20)]
    for again in range(2):
        pins = pool.pins
        for sizes in steps:
            draw.shuffle(sizes)
            slabs = [pool.lease(size) for size in sizes]
            draw.shuffle(slabs)
            for slab in slabs:
                assert slab is not None
                pool.give_back(slab)
        assert not again or pool.pins == pins


def test_a_pool_that_is_full_refuses_and_recovers() -> None:
    pool = Pool(CpuBackend(), 3 * MB)
    first, second, third = (pool.lease(MB) for _ in range(3))
    assert first and second and third
    assert pool.lease(1) is None and pool.leased == pool.peak == 3 * MB
    pool.give_back(first)
    assert pool.lease(2 * MB) is None  # and the idle slab is still there
    assert pool.lease(MB) is first
    pool.give_back(second)
    pool.give_back(third)
    larger = pool.lease(2 * MB)
    assert larger is not None and pool.held == 3 * MB
    pool.give_back(larger)
    pool.give_back(first)
    pool.trim()
    assert pool.held == pool.leased == 0 and pool.peak == 3 * MB


def test_after_a_failure_to_pin_the_pool_stops_growing() -> None:
    class Refusing(CpuBackend):
        asked = 0

        def pin(self, size: int) -> torch.Tensor | None:
            self.asked += 1
            return super().pin(size) if self.asked < 3 else None

    backend = Refusing()
    pool = Pool(backend, 100 * MB)
    slabs = [pool.lease(MB) for _ in range(5)]
    assert slabs.count(None) == 3 and backend.asked == 3 and pool.host_bytes == 2 * MB


def test_a_dropped_pool_unpins_its_memory() -> None:
    class Counting(CpuBackend):
        pinned = 0

        def pin(self, size: int) -> torch.Tensor | None:
            self.pinned += 1
            return super().pin(size)

        def unpin(self, memory: torch.Tensor) -> None:
            self.pinned -= 1

    backend, model = Counting(), Model(4)
    plan = offload.attach(model, fraction="all", keep_last=0, min_bytes=0, backend=backend)
    step(model, rows=20)
    assert backend.pinned > 0
    del plan, model  # without detach
    gc.collect()
    assert backend.pinned == 0


def test_slabs_come_back_from_other_threads() -> None:
    pool = Pool(CpuBackend(), 64 * MB)
    slabs: list[Slab] = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(200):
            slab = pool.lease(draw.randrange(1, MB))
            if slab is not None:
                slabs.append(slab)
                pool.give_back(slabs.pop())

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pool.leased == 0 and pool.held <= pool.host_bytes


@pytest.mark.parametrize("limit", [1 << 30, 100_000, 30_000])
def test_a_model_over_forty_lengths(limit: int) -> None:
    """On real graphs: never over the limit, no pin on the second pass, nothing left."""
    model = Model(4)
    settings = {"fraction": "all", "keep_last": 0, "min_bytes": 0, "host_bytes": limit}
    lengths = random.Random(2).sample(range(8, 400), 40)
    expected = [step(model, rows=rows) for rows in lengths]
    plan = offload.attach(model, **settings)  # pyright: ignore
    pool = plan.store.pool
    for rows, wanted in zip(lengths, expected, strict=True):
        assert same(step(model, rows=rows), wanted)
        assert pool.held <= limit and pool.leased == 0
    pins = pool.pins
    random.Random(3).shuffle(lengths)
    for rows in lengths:
        step(model, rows=rows)
        assert pool.held <= limit and pool.leased == 0
    if limit == 1 << 30:
        assert pool.pins == pins and plan.stats().kept == 0
    else:
        assert plan.stats().kept > 0
    plan.detach()


def test_host_memory_is_shared_by_the_ranks_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    alone = available_host_memory()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert alone > 0 and available_host_memory() == pytest.approx(alone / 4, rel=0.2)


_unpackings = itertools.count(1)


def offloaded(planner: Planner, passes: int, size: int = 1, blocks: int = 10) -> list[int]:
    """How many blocks of each pass are offloaded. A backward comes before each but the first."""
    found = []
    for _ in range(passes):
        unpacked = next(_unpackings)
        found.append(sum(planner.wants(n, size, unpacked) for n in range(blocks)))
    return found


@pytest.mark.parametrize(("fraction", "count"), [("all", 10), (1, 10), (0.5, 5), (0.3, 3), (0, 0)])
def test_a_fixed_fraction(fraction: float, count: int) -> None:
    planner = Planner(fraction, lambda: pytest.fail("nothing to measure"))
    assert sum(offloaded(planner, 10)) == pytest.approx(10 * count, abs=1)


def test_a_fraction_is_spread_evenly() -> None:
    planner = Planner(0.5, lambda: (0, 0, 0))
    assert [planner.wants(n, 1, 0) for n in range(6)] == [False, True] * 3


@pytest.mark.parametrize(
    ("headroom", "count"), [(-50, 10), (0, 10), (40, 6), (99, 0), (100, 0), (1e12, 0)]
)
def test_auto_offloads_what_does_not_fit(headroom: float, count: int) -> None:
    planner = Planner("auto", lambda: (100, headroom, 0.0))
    found = offloaded(planner, WARM_UP + 3)
    assert found[:WARM_UP] == [10] * WARM_UP
    assert all(abs(n - count) <= 1 for n in found[WARM_UP:])
    assert headroom != 99 or sum(found[WARM_UP:]) <= 1


def test_auto_measures_again_for_larger_inputs() -> None:
    planner = Planner("auto", lambda: (100, 1000.0, 0.0))
    assert offloaded(planner, WARM_UP + 2, size=10) == [10] * WARM_UP + [0, 0]
    assert offloaded(planner, 2, size=5) == [0, 0]
    assert offloaded(planner, WARM_UP + 1, size=11) == [10] * WARM_UP + [0]


def test_auto_waits_for_the_first_optimizer_step() -> None:
    planner = Planner("auto", lambda: (100, 1000.0, 0.0), micro_batches=4)
    assert offloaded(planner, WARM_UP + 5) == [10] * (WARM_UP + 3) + [0, 0]


def test_a_block_that_is_called_many_times_is_one_pass() -> None:
    planner = Planner("auto", lambda: (100, 1000.0, 0.0))
    wanted = [sum(planner.wants(0, 1, 12 * done) for _ in range(12)) for done in range(WARM_UP + 2)]
    assert wanted == [12] * WARM_UP + [0, 0]


def test_a_plan_that_keeps_all_its_blocks_warns(caplog: pytest.LogCaptureFixture) -> None:
    offload.attach(Model(2), keep_last=2).detach()
    assert "keep_last = 2 keeps all 2 blocks" in caplog.text


def test_auto_on_a_device_with_some_space() -> None:
    model = Model(8)
    backend = SimBackend()
    size = 64 * WIDTH * 4
    backend.room = 8 * size_class(size)  # of 16 tensors, two of each block
    plan = offload.attach(model, keep_last=0, min_bytes=0, host_bytes=MB, backend=backend)
    expected = None
    moved = []
    for _ in range(WARM_UP + 2):
        before = plan.stats()
        found = step(model, rows=64)
        assert expected is None or same(found, expected)
        expected = found
        moved.append(plan.stats().since(before).bytes_out)
    assert moved == [16 * size] * WARM_UP + [8 * size] * 2
    assert not backend.violations
    plan.detach()
