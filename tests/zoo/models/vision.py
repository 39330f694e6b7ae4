"""Convolutional networks, and losses over images."""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from tests.zoo.data import SAMPLES, images
from tests.zoo.entry import entry
from tests.zoo.models.basics import mse


@entry(images, bf16=0.1, autocast=True)
class Convolutions(nn.Module):
    """Strided, depthwise and pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.Conv2d(8, 12, 1),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Linear(48, 3)

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.layers(x)).float(), kind)


@entry(images)
class TransposedConvolutions(nn.Module):
    """An autoencoder of images."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 6, 4, stride=2, padding=1), nn.GELU())
        self.decoder = nn.ConvTranspose2d(6, 3, 4, stride=2, padding=1)

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        return mse(self.decoder(self.encoder(x)), x)


class SmallUNet(nn.Module):
    """Down, up, and a connection across; the time goes in at the bottom."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, padding=1)
        self.bottom = nn.Conv2d(8, 8, 3, padding=1)
        self.time = nn.Linear(1, 8)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.last = nn.Conv2d(16, 3, 3, padding=1)

    def run(self, x: Tensor, time: Tensor) -> Tensor:
        """The output for images [n, 3, 8, 8] at times [n, 1]."""
        across = F.silu(self.down(x))
        hidden = F.silu(self.bottom(F.max_pool2d(across, 2)))
        hidden = hidden + self.time(time)[:, :, None, None]
        return self.last(torch.cat([self.up(hidden), across], 1))


@entry(images)
class UNet(SmallUNet):
    """Segments an image."""

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        logits = self.run(x, x.new_ones(len(x), 1))
        return F.cross_entropy(logits.float(), x.argmax(1))


def diffused(generator: Generator, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images [4, 3, 8, 8], noise of that shape, and times [4, 1]."""
    x = torch.randn(SAMPLES, 3, 8, 8, generator=generator).cumsum(3) / 2
    noise = torch.randn(x.shape, generator=generator)
    return x, noise, torch.rand(SAMPLES, 1, generator=generator)


@entry(diffused, autocast=True)
class DiffusionDenoiser(SmallUNet):
    """Predicts the noise in a noised image (Ho et al. 2020)."""

    def forward(self, x: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        angle = time[:, :, None, None] * torch.pi / 2
        return mse(self.run(angle.cos() * x + angle.sin() * noise, time), noise)


def two_views(generator: Generator, number: int) -> tuple[Tensor, Tensor]:
    """Two noisy views of the same images, [4, 3, 8, 8] each."""
    x, _ = images(generator, number)
    noise = torch.randn(2, *x.shape, generator=generator)
    return x + noise[0], x + noise[1]


@entry(two_views)
class Contrastive(nn.Module):
    """Each image's other view among those of the micro-batch (of this rank alone)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.GELU(), nn.Flatten(), nn.Linear(72, 8)
        )
        self.temperature = nn.Parameter(torch.tensor([0.5]))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        a, b = (F.normalize(self.encoder(view).float(), dim=1) for view in (left, right))
        logits = a @ b.T * self.temperature.float().exp()
        target = torch.arange(len(left))
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@entry(images, bf16=0.1)
class VisionTransformer(nn.Module):
    """Patches, a class token and positions as parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 5, 8) * 0.02)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).mT
        hidden = torch.cat([self.token.expand(len(x), 1, 8), patches], 1) + self.positions
        return F.cross_entropy(self.head(self.encoder(hidden)[:, 0]).float(), kind)
