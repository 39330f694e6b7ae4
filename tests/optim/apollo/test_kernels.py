"""`fused = true`: Triton's kernels in its interpreter, which needs no GPU. Skipped without triton,
which comes with torch for CUDA: `pip install triton`."""

import copy
import importlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness import devices
from harness.optim import Apollo, ApolloMini, apollo, apollo_param_groups
from harness.optim.apollo.channels import ChannelPlan, Matrix
from harness.optim.apollo.philox import gaussian, key_of
from harness.zero.partition import Segment
from harness.zero.shards import Shard
from tests.optim.apollo.test_launches import Llama
from tests.support.fake_cuda import Launches, fake_cuda

Kind = Callable[..., Apollo]
MODULE = "harness.optim.apollo.kernels"
CPU = torch.device("cpu")
KINDS = [partial(Apollo, rank=4), ApolloMini]


@pytest.fixture(scope="module")
def kernels() -> Iterator[Any]:
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.delitem(sys.modules, MODULE, raising=False)
        yield importlib.import_module(MODULE)
        del sys.modules[MODULE]
        delattr(apollo, "kernels")


@pytest.mark.parametrize(
    ("rows", "columns"),
    [(range(37), range(16)), (range(5, 90), range(30)), (range(9), range(3, 13))],
)
def test_projections_are_equal_to_the_bit(kernels: Any, rows: range, columns: range) -> None:
    keys = [key_of(7, name) for name in "abc"]
    arguments = rows, columns, [0, 5, 2**31], keys, CPU
    assert torch.equal(kernels.gaussian(*arguments), gaussian(*arguments))


def trained(start: list[nn.Parameter], kind: Kind, **settings: Any) -> list[Tensor]:
    """The weights after 7 steps, one of which is skipped."""
    parameters = copy.deepcopy(start)
    optimizer = kind(parameters, lr=1e-2, update_proj_gap=3, gamma=None, **settings)
    for number in range(7):
        torch.manual_seed(number)
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
            if number == 4:
                parameter.grad.flatten()[3] = torch.inf
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_fused_step(kind: Kind, decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal but for last bits of weights: torch does not round a product before it adds it."""
    monkeypatch.setitem(devices.LIMITS, "cpu", devices.LIMITS["cuda"])
    torch.manual_seed(9)
    shapes = [(24, 16), (16, 24), (90, 70), (8, 3, 7)]
    start = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    ends = [trained(start, kind, weight_decay=decay, fused=fused) for fused in (False, True)]
    for plain, fused in zip(*ends, strict=True):
        assert torch.allclose(plain, fused, rtol=1e-6, atol=3e-7)


def test_pieces_of_matrices(kernels: Any) -> None:
    """As ZeRO 3 cuts them: parts of rows, and several rows, along rows and columns."""
    for rows, columns in ((9, 7), (7, 9)):
        cut, numel = 24, rows * columns
        segments = tuple(
            (Segment(name="w", start=start, offset=0, length=stop - start),)
            for start, stop in ((0, cut), (cut, numel))
        )
        for rank in (0, 1):
            shard = Shard(segments, rank)
            plan = ChannelPlan([shard], {"w": [Matrix("w", 0, rows, columns)]})
            by_rows = [plan.matrices[tile.matrix].by_rows for tile in plan.tiles]
            update = kernels.Update(plan.tiles, by_rows, CPU)
            weight = torch.randn(max(cut, numel - cut))
            gradient, steps = torch.randn_like(weight), torch.rand(plan.slots)
            expected = weight.clone()
            for tile in plan.tiles:
                tile.of([expected]).sub_(tile.of([gradient]) * steps[tile.slots, None])
            update([weight], [gradient], steps, None, torch.tensor(False))
            assert not torch.equal(weight, expected)
            update([weight], [gradient], steps, None, torch.tensor(True))
            assert torch.equal(weight, expected)


class Launch:
    """A kernel that is only counted."""

    def __init__(self) -> None:
        self.count = 0

    def __getitem__(self, grid: Any) -> Any:
        return self

    def __call__(self, *args: Any, **settings: Any) -> None:
        self.count += 1


@pytest.mark.filterwarnings("ignore:Accessing the data pointer:UserWarning")
@pytest.mark.parametrize(
    ("layers", "most"), [(2, 160), pytest.param(24, 600, marks=pytest.mark.slow)]
)
def test_launches(kernels: Any, layers: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a LLaMA with 24 layers, 1.3 billion parameters; renewing P takes one more per matrix."""
    matrices = 7 * layers
    made, updated = Launch(), Launch()
    monkeypatch.setattr(kernels, "_gaussian", made)
    monkeypatch.setattr(kernels, "_update", updated)
    counted = []
    with fake_cuda():
        model = Llama(layers)
        groups = apollo_param_groups(model, rank=256)
        optimizer = Apollo(groups, update_proj_gap=2, fused=True)
        for _ in range(3):
            made.count = updated.count = 0
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter)
            with Launches() as launches:
                optimizer.step()
            addresses = 1  # a copy of those of new gradients
            counted.append((launches, launches.total + made.count + updated.count + addresses))
            assert (made.count, updated.count) == (0 if len(counted) == 2 else matrices, 1)
    (_, _), (usual, total), (refresh, with_refresh) = counted  # the first lays out the state
    assert usual.waits == refresh.waits == []
    assert total <= most, usual.kernels
    assert with_refresh - total <= 2 * matrices + 40, refresh.kernels


def test_without_a_gpu_it_is_refused(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "IS_INTERPRETED", False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(ValueError, match="fused = true needs a GPU"):
        Apollo([nn.Parameter(torch.zeros(3, 2))], fused=True)
