"""Models with buffers that training changes, which differ between ranks if nothing is done."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness import distributed
from harness.config import Config
from harness.task import Task


class Normalized(nn.Module):
    """A BatchNorm: float and integer buffers, updated in place by a kernel."""

    def __init__(self) -> None:
        super().__init__()
        first = nn.Linear(4, 16, bias=False)  # a bias would have gradients of rounding errors only
        self.net = nn.Sequential(first, nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, x: Tensor, y: Tensor) -> None:
        self.loss = F.mse_loss(self.net(x), y)


class Quantized(nn.Module):
    """A VQ-VAE whose codes follow their inputs by a moving average (van den Oord et al. 2017)."""

    codes: Tensor

    def __init__(self, grows: int = 0) -> None:
        super().__init__()
        self.left = grows  # calls until rank 1 gets one more code
        self.enc, self.dec = nn.Linear(4, 8), nn.Linear(8, 4)
        codes = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
        self.register_buffer("codes", codes)

    def forward(self, x: Tensor, y: Tensor) -> None:
        z = self.enc(x)
        nearest = torch.cdist(z.float(), self.codes.float()).argmin(1)
        codes = self.codes[nearest].to(z)
        if self.training:
            with torch.no_grad():
                for k in nearest.unique():
                    self.codes[k].lerp_(z[nearest == k].mean(0).to(self.codes), 0.2)
            self.left -= 1
            if self.left == 0 and distributed.global_rank() == 1:
                self.codes = torch.cat([self.codes, self.codes[:1]])
        reconstructed = self.dec(z + (codes - z).detach())
        self.loss = F.mse_loss(reconstructed, x) + 0.25 * F.mse_loss(z, codes)


class Mixed(nn.Module):
    """Buffers of many kinds, all of which the loss depends on."""

    fixed: Tensor
    mean: Tensor
    hidden: Tensor
    late_mean: Tensor
    calls: Tensor
    seen: Tensor
    lazy: Tensor

    def __init__(self, late: int = 4) -> None:
        super().__init__()
        self.net = nn.Linear(4, 1)
        self.late = late  # the first call that changes `late_mean`
        self.register_buffer("fixed", torch.randn(3, generator=torch.Generator().manual_seed(0)))
        self.register_buffer("mean", torch.zeros(()), persistent=False)
        self.register_buffer("replaced", torch.ones(2, dtype=torch.float64))
        self.register_buffer("hidden", torch.zeros(3, 2).T)
        self.register_buffer("late_mean", torch.zeros(1))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int32))
        self.register_buffer("seen", torch.zeros(5, dtype=torch.bool))
        self.register_buffer("cache", torch.zeros(0), persistent=False)
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor, y: Tensor) -> None:
        if self.training:
            with torch.no_grad():
                self.mean += x.mean()  # in place
                self.replaced = self.replaced + x[0, 0].abs()  # another tensor
                self.hidden.data.lerp_(x[:2, :3], 0.5)  # unknown to `_version`
                self.calls += 1
                self.seen[int(x.abs().sum()) % 5] = True
                if self.calls >= self.late:
                    self.late_mean += x.std()
                self.cache = torch.ones(int(x.abs().sum()))  # of another length on every rank
                if "lazy" not in self._buffers:
                    self.register_buffer("lazy", torch.zeros(1), persistent=False)
                self.lazy += x.var()
        shift = self.mean + self.replaced.sum() + self.hidden.sum() + self.late_mean.sum()
        lazy = self.lazy.sum() if "lazy" in self._buffers else 0.0
        shift = shift + self.seen.sum() + lazy * (self.calls + self.fixed.sum())
        self.loss = F.mse_loss(self.net(x) + 0.01 * shift.float(), y)


class Positions(nn.Module):
    """A table that is added to activations, and one of angles, which is used in float32."""

    table: Tensor
    inv_freq: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 1)
        self.register_buffer("table", torch.randn(8))
        self.register_buffer("inv_freq", 10.0 ** -torch.arange(4.0), persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> None:
        x = x * (self.inv_freq.float() * 3).cos().to(x)
        self.loss = F.mse_loss(self.last(self.first(x) + self.table).float(), y.float())


class Headed(nn.Module):
    """A submodule that the user keeps in float32."""

    def __init__(self, half: bool = False) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 8), nn.Linear(8, 1)
        if half:
            self.first.bfloat16()

    def forward(self, x: Tensor, y: Tensor) -> None:
        features = self.first(x).float()
        with torch.autocast(x.device.type, enabled=False):
            self.loss = F.mse_loss(self.head(features), y.float())


class Points(torch.utils.data.Dataset):
    """Random points of 4 numbers, and a number for each."""

    def __init__(self, samples: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(samples, 4, generator=generator) * 3 + 1
        self.y = self.x.prod(1, keepdim=True).tanh()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


def model(kind: str, **args: Any) -> nn.Module:
    """The model of that kind."""
    match kind:
        case "norm":
            return Normalized()
        case "codes":
            return Quantized(**args)
        case "positions":
            return Positions()
        case "headed":
            return Headed(**args)
        case _:
            return Mixed(**args)


def build(config: Config) -> Task:
    args = dict(config.task.args)
    kind, differs = args.pop("kind"), args.pop("differs", False)
    models = {name: model(kind, **args) for name in config.engines}
    for net in models.values() if differs else ():
        net.get_buffer("fixed").add_(distributed.global_rank())
    return Task(models=models, train_data=Points(96, 1), eval_data=Points(40, 2))
