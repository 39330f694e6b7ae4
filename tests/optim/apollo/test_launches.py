"""How many kernels an APOLLO step launches on a GPU, counted without one; and that pieces of work
made for a GPU give the same results as those made for a CPU's cache."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness import devices
from harness.optim import Apollo, ApolloMini, apollo_param_groups
from harness.optim.apollo.philox import gaussian, key_of, rademacher
from tests.support.fake_cuda import Launches, fake_cuda

WIDTH, HIDDEN, LAYERS, WORDS = 2048, 5461, 24, 32000  # a LLaMA of 1.3 billion parameters
BATCHES = 6
"""Of projections, with all layers: a batch is 32 matrices of this width at rank 256."""


class Block(nn.Module):
    """The parameters of a LLaMA block."""

    def __init__(self) -> None:
        super().__init__()
        sides = [(WIDTH, WIDTH)] * 4 + [(WIDTH, HIDDEN)] * 2 + [(HIDDEN, WIDTH)]
        self.linears = nn.ModuleList(nn.Linear(*s, bias=False, device="cuda") for s in sides)
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH, device="cuda") for _ in range(2))


class Llama(nn.Module):
    """The parameters of a LLaMA."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(WORDS, WIDTH, device="cuda")
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.norm = nn.RMSNorm(WIDTH, device="cuda")
        self.lm_head = nn.Linear(WIDTH, WORDS, bias=False, device="cuda")


def steps(layers: int) -> tuple[Launches, Launches]:
    """A step, and one that renews the projections."""
    counted = []
    with fake_cuda():
        model = Llama(layers)
        optimizer = Apollo(apollo_param_groups(model, rank=256), update_proj_gap=2)
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter)
            with Launches() as launches:
                optimizer.step()
            counted.append(launches)
    return counted[1], counted[2]  # the first also lays out the state


@pytest.mark.filterwarnings("ignore:Accessing the data pointer:UserWarning")
def test_the_launches_of_a_step_extrapolated_from_few_layers() -> None:
    (one, _), (two, refresh) = steps(1), steps(2)
    assert two.total + (LAYERS - 2) * (two.total - one.total) <= 1000
    renewing = refresh.total - two.total  # one batch
    assert 1000 + BATCHES * renewing <= 5000
    assert two.waits == [] and refresh.waits == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Accessing the data pointer:UserWarning")
def test_the_launches_of_a_step() -> None:
    usual, refresh = steps(LAYERS)
    assert usual.total <= 1000, usual.kernels
    assert refresh.total <= 5000, refresh.kernels
    assert usual.waits == [] and refresh.waits == []


@pytest.mark.parametrize("make", [gaussian, rademacher])
def test_a_batch_is_made_of_the_same_numbers(make: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the counters of several matrices, or of part of one, are a piece of work."""
    cpu = torch.device("cpu")
    keys = [key_of(0, name) for name in "abcde"]
    rows, columns, refreshes = range(3, 40), range(5, 300), [0, 1, 2**31, 7, 0]
    single = [make(rows, columns, [r], [k], cpu)[0] for r, k in zip(refreshes, keys, strict=True)]  # type: ignore[operator]
    for counters in (1, 100, 7000, 2**20):
        few = devices.Limits(1, counters, 0, 0, is_asynchronous=False)
        monkeypatch.setitem(devices.LIMITS, "cpu", few)
        assert torch.equal(make(rows, columns, refreshes, keys, cpu), torch.stack(single))  # type: ignore[operator]


@pytest.mark.parametrize("kind", [Apollo, ApolloMini])
@pytest.mark.parametrize("projection", ["gaussian", "svd"])
def test_pieces_for_a_gpu_give_the_same_weights(
    kind: type[Apollo], projection: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    shapes = [(96, 64), (64, 96), (96, 64), (700, 600), (300, 64, 3), (64, 96)]
    start = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    gradients = [[torch.randn(shape) for shape in shapes] for _ in range(7)]
    gradients[4][1][2, 3] = torch.inf  # a step to skip
    ends = []
    for kind_of_device in ("cpu", "cuda"):
        monkeypatch.setitem(devices.LIMITS, "cpu", devices.LIMITS[kind_of_device])
        parameters = copy.deepcopy(start)
        optimizer = kind(parameters, lr=1e-2, update_proj_gap=3, projection=projection, gamma=None)
        for given in gradients:
            for parameter, gradient in zip(parameters, given, strict=True):
                parameter.grad = gradient
            optimizer.step()
        ends.append([parameter.detach() for parameter in parameters])
    for one, other in zip(*ends, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-6)


def test_channels_are_summed_in_one_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU has one thread for a segment of several columns; the sums are the same to the bit."""
    plain, shapes = torch.segment_reduce, []

    def reduce(data: Tensor, *words: Any, lengths: Tensor, **settings: Any) -> Tensor:
        sums = plain(data, *words, lengths=lengths, **settings)
        columns, of_column = data.view(3, -1).T.contiguous(), lengths.view(3, -1)[0]
        assert torch.equal(plain(columns, *words, lengths=of_column, **settings).T.flatten(), sums)
        shapes.append(data.dim())
        return sums

    monkeypatch.setattr(torch, "segment_reduce", reduce)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in ((96, 64), (64, 96), (70, 90))]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    Apollo(parameters, rank=4).step()
    assert shapes == [1]
