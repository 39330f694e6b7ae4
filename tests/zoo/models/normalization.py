"""Normalizations and re-parametrizations: buffers, and weights that are computed from others."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.zoo.data import images, sequences, vectors
from tests.zoo.entry import entry
from tests.zoo.models.basics import mse

CAST_BUFFERS = {"net": {"buffer_dtype": "model"}}
"""In bf16 these modules want buffers in bf16 as well."""


@entry(vectors, engines=CAST_BUFFERS)
class BatchNorm(nn.Module):
    """Running statistics: each rank's own samples in a step, rank 0's afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 8)
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return mse(self.layers(x), y)


@entry(images, autocast=True)
class GroupNormAndInstanceNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.GroupNorm(2, 8),
            nn.SiLU(),
            nn.Conv2d(8, 8, 3, padding=1, bias=False),
            nn.InstanceNorm2d(8, affine=True),
            nn.SiLU(),
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.layers(x).square().mean((2, 3))).float(), kind)


@entry(vectors)
class RmsNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm = nn.RMSNorm(16)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return mse(self.last(torch.tanh(self.norm(self.first(x)))), y)


@entry(sequences)
class WeightNorm(nn.Module):
    """torch's parametrization."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = parametrizations.weight_norm(nn.Conv1d(8, 8, 3, padding=1))
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return mse(self.last(torch.tanh(self.layer(x.mT)).mean(2)), y)


@entry(sequences)
class OldWeightNorm(WeightNorm):
    """torch's older one, a hook before the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.utils.weight_norm(nn.Conv1d(8, 8, 3, padding=1))


@entry(vectors, engines=CAST_BUFFERS, bf16=1e-1)
class SpectralNorm(nn.Module):
    """Buffers that change with every forward: the power iteration's unit vectors, whose short way
    is only a few times what bf16 rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.first = parametrizations.spectral_norm(nn.Linear(8, 16))
        self.last = parametrizations.spectral_norm(nn.Linear(16, 8))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return mse(self.last(torch.tanh(self.first(x))), y)


@entry(vectors)
class VqCodebook(nn.Module):
    """A codebook in buffers, learned by moving averages (van den Oord et al. 2017)."""

    codes: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(8, 4), nn.Linear(4, 8)
        codes = torch.randn(6, 4)
        self.register_buffer("codes", codes)
        self.register_buffer("counts", torch.ones(6))
        self.register_buffer("sums", codes.clone())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = self.encoder(x)
        codes = self.codes.to(x.dtype)
        chosen = torch.cdist(hidden.detach().float(), self.codes.float()).argmin(1)
        quantized = codes[chosen]
        if self.training:
            self._learn(hidden.detach(), F.one_hot(chosen, 6))
        passed = hidden + (quantized - hidden).detach()
        return mse(self.decoder(passed), y) + 0.25 * mse(hidden, quantized.detach())

    @torch.no_grad()
    def _learn(self, hidden: Tensor, chosen: Tensor) -> None:
        chosen = chosen.to(self.counts)
        self.counts.lerp_(chosen.sum(0), 0.1)
        self.sums.lerp_(chosen.T @ hidden.to(self.sums), 0.1)
        self.codes.copy_(self.sums / self.counts[:, None])


@entry(vectors)
class LayerNormInFp32(nn.Module):
    """A norm whose author computes it in fp32, in a model of any precision."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = self.first(x)
        weight, bias = self.norm.weight.float(), self.norm.bias.float()
        return mse(self.last(F.layer_norm(hidden.float(), (8,), weight, bias).to(hidden)), y)


@entry(vectors)
class RunningScale(nn.Module):
    """A buffer that all ranks change alike: a schedule that the model keeps itself."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.training:
            self.scale.mul_(0.9)
        return mse(self.layer(x) * self.scale.to(x.dtype), y)
