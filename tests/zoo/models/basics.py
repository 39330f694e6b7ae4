"""Small feed-forward models, each with one thing that a sharded layout could get wrong."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.zoo.data import WORDS, classes, tokens, vectors
from tests.zoo.entry import entry


def mse(found: Tensor, target: Tensor) -> Tensor:
    """The mean squared error, computed in fp32."""
    return F.mse_loss(found.float(), target.float())


@entry(vectors, autocast=True)
class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return mse(self.last(torch.tanh(self.first(x))), y)


@entry(vectors, clip=0.0, autocast=True)
class WithoutClipping(Mlp):
    pass


@entry(vectors)
class DeepResidualNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
            for _ in range(8)
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return mse(x, y)


@entry(tokens, autocast=True)
class TiedHead(nn.Module):
    """Embedding and head are one parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 8)
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        logits = self.head(torch.tanh(self.middle(self.words(words[:, :-1]))))
        return F.cross_entropy(logits.float().flatten(0, 1), words[:, 1:].flatten())


@entry(tokens)
class HeadFromAnotherModule(nn.Module):
    """Reads the embedding's weight without calling the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 8)
        self.middle = nn.Linear(8, 8)

    def forward(self, words: Tensor) -> Tensor:
        hidden = torch.tanh(self.middle(self.words(words[:, :-1])))
        logits = F.linear(hidden, self.words.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), words[:, 1:].flatten())


@entry(vectors)
class ReusedLayer(nn.Module):
    """One layer, called twice in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return mse(self.layer(torch.tanh(self.layer(x))), y)


@entry(vectors)
class SharedAcrossDepths(nn.Module):
    """A block of two layers, used at every depth, under several names."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.blocks = nn.ModuleList([block, nn.Linear(8, 8), block, block])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return mse(x, y)


@entry(vectors)
class ParameterListAndDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([0.3 * torch.randn(8, 8) for _ in range(3)])
        self.scales = nn.ParameterDict({"scale": torch.ones(8)})

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for weight in self.weights:
            x = torch.tanh(x @ weight)
        return mse(x * self.scales["scale"], y)


@entry(vectors)
class ZeroDimensionalParameter(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return mse(self.scale * self.last(torch.tanh(self.first(x))), y)


@entry(vectors)
class ZeroElementParameter(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Parameter(torch.ones(0, 8))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, y) + self.extra.sum()


@entry(vectors)
class OddSizes(nn.Module):
    """Sizes that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 8)
        )
        self.tilt = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return mse(self.layers(x) * self.tilt, y)


@entry(vectors)
class HyperNetwork(nn.Module):
    """One network computes the weights of another, which is called as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Parameter(torch.randn(1, 6))
        self.weights = nn.Linear(6, 8 * 8 + 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        weight, bias = (0.3 * self.weights(self.code)[0]).split([64, 8])
        with torch.device("meta"):
            layer = nn.Linear(8, 8)
        made = {"weight": weight.view(8, 8), "bias": bias}
        return mse(torch.func.functional_call(layer, made, (x,)), y)


@entry(vectors)
class ComplexArithmetic(nn.Module):
    """Real parameters, complex numbers between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.filter = nn.Parameter(torch.randn(5, 2) * 0.5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(self.first(x).float()) * torch.view_as_complex(
            self.filter.float()
        )
        return mse(self.last(torch.fft.irfft(spectrum, n=8).to(x.dtype)), y)


@entry(vectors)
class SoftMixtureOfExperts(nn.Module):
    """All experts compute, and a gate weighs them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(3)
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shares = self.gate(x).softmax(1)
        answers = torch.stack([expert(x) for expert in self.experts], 1)
        return mse((shares[..., None] * answers).sum(1), y)


@entry(vectors)
class MultiTaskHeads(Mlp):
    """Several heads and losses, weighed by learned uncertainties (Kendall et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(16, 8)
        self.uncertainty = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        found = F.l1_loss(self.second(hidden).float(), y.float())
        losses = torch.stack([mse(self.last(hidden), y), found])
        scale = self.uncertainty.float()
        return (torch.exp(-scale) * losses + scale).sum()


@entry(classes)
class Siamese(nn.Module):
    """One encoder for both sides of a pair; pairs of one class are close."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        left, right = self.encoder(x).float(), self.encoder(x.roll(1, 0)).float()
        distance = (left - right).square().sum(1)
        is_same = kind == kind.roll(1)
        return torch.where(is_same, distance, F.relu(2 - distance)).mean()


@entry(vectors)
class ActivationCheckpointing(nn.Module):
    reentrant = False

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(3)
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + checkpoint(layer, x, use_reentrant=self.reentrant)
        return mse(x, y)


@entry(vectors)
class ReentrantCheckpointing(ActivationCheckpointing):
    reentrant = True


@entry(vectors)
class GradientInTheLoss(nn.Module):
    """Forces are the gradient of an energy: the backward goes through a backward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        energy = self.last(torch.tanh(self.first(x))).sum()
        (gradient,) = torch.autograd.grad(energy, x, create_graph=True)
        return mse(-gradient, y)
