"""Every order that offloading relies on, on simulated copy streams; and each left out once."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from harness import offload
from harness.testing.sim import BACK, COMPUTE, OUT, SimBackend, Wait
from tests.support.offload_models import WIDTH, Model, gradients, one_thread, same, step


def scenario(model: Model, on_stream: Callable[[str], None]) -> list[Tensor]:
    """What happens to graphs: used, dropped, used in part, two at a time, twice; on two streams."""
    found = []
    for seed in range(3):
        on_stream(f"{COMPUTE} 0")
        found += step(model, seed, rows=8 + 8 * seed)
        on_stream(f"{COMPUTE} 1")
        model(torch.randn(8, WIDTH))  # a graph that nobody wants
    middle = model.blocks[0](model.blocks[1](torch.randn(8, WIDTH)))
    end = model.blocks[3](model.blocks[4](model.blocks[5](middle)))
    found += torch.autograd.grad(end.sum(), middle)  # what is before has been prefetched in vain
    del middle, end
    model.zero_grad()
    on_stream(f"{COMPUTE} 0")
    first = model(torch.randn(8, WIDTH)).square().sum()
    second = model(torch.randn(8, WIDTH)).square().sum()
    on_stream(f"{COMPUTE} 1")
    first.backward(retain_graph=True)
    second.backward()
    first.backward()
    return found + gradients(model)


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return Model()


@pytest.fixture(scope="module")
def expected(model: Model) -> list[Tensor]:
    return scenario(model, lambda name: None)


def is_right(
    model: Model, expected: list[Tensor], backend: SimBackend, mode: offload.Mode = "inputs"
) -> bool:
    """Whether all is equal to the plain model's, no access is unordered, and nothing is left."""

    def on_stream(name: str) -> None:
        backend.current = name

    plan = offload.attach(
        model,
        mode=mode,
        fraction="all",
        keep_last=0,
        min_bytes=0,
        host_bytes=1 << 20,
        backend=backend,
    )
    try:
        found = scenario(model, on_stream)
        backend.finish()
        leased = plan.store.pool.leased
    finally:
        plan.detach()
    return same(found, expected) and not backend.violations and leased == 0


@pytest.mark.parametrize("mode", ["inputs", "saved"])
@pytest.mark.parametrize("seed", range(8))
def test_copies_at_any_legal_time_change_nothing(
    model: Model, expected: list[Tensor], seed: int, mode: offload.Mode
) -> None:
    backend = SimBackend(seed, eagerness=(0, 0.1, 0.3, 0.9)[seed % 4])
    assert is_right(model, expected, backend, mode), backend.violations


RULES: dict[str, Wait] = {
    "1 copied out before it is computed": (OUT, COMPUTE),
    "2 host buffer returned early": (OUT, BACK),
    "3 source freed early": (COMPUTE, OUT),
    "4 fetched into memory that is in use": (BACK, COMPUTE),
    "5 missing D2H wait": (BACK, OUT),
    "6 missing H2D wait": (COMPUTE, BACK, "stall"),
    "7 in-flight death": (COMPUTE, BACK, "wait"),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("eagerness", [0, 0.3, 0.9])
def test_removing_a_wait_is_detected(
    model: Model, expected: list[Tensor], eagerness: float, rule: str
) -> None:
    assert not is_right(model, expected, SimBackend(1, eagerness, without=RULES[rule]))
