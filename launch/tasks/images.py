"""Classification of images: a small residual network with BatchNorm learns handwritten digits.

He et al., "Deep Residual Learning for Image Recognition", 2015. Every time that an image is read
for training, it is turned, scaled and shifted a little, differently each time; what is held out
stays as it is.

Tensor names end in their shape: N images, B batch, C channels, H and W pixels, K classes.
"""

import math
from typing import Any

import digits
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import Dataset

from harness.config import Config, Section
from harness.task import Stats, Task

SIDE = 8
CLASSES = 10


class ImagesArgs(Section):
    """[task] args = {...} of this task."""

    channels: int = Field(default=32, ge=1)
    """Channels of the first half of the network; the second half has twice as many."""
    blocks: int = Field(default=2, ge=1)
    """Residual blocks in each half."""
    turn: float = Field(default=10.0, ge=0, le=180)
    """Augmentation: images are turned by up to so many degrees,"""
    scale: float = Field(default=0.1, ge=0, lt=1)
    """made larger or smaller by up to this fraction,"""
    shift: float = Field(default=1.0, ge=0, le=SIDE)
    """and shifted by up to so many pixels each way. With 0 for all three they stay as they are."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Part of the training target that is spread over all classes."""


def build(config: Config) -> Task:
    """The task of `config.task.args`, with the engine "net".

    Raises pydantic's ValidationError for wrong arguments, and what `digits.read` raises.
    """
    args = ImagesArgs.model_validate(config.task.args)
    train, held_out = digits.split(*digits.read())

    def feed(engine: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Stats]:
        images_BCHW = batch[0].to(engine.device, engine.dtype)
        digits_B = batch[1].to(engine.device)
        logits_BK = engine(images_BCHW).float()
        smoothing = args.label_smoothing if engine.module.training else 0.0
        loss = F.cross_entropy(logits_BK, digits_B, label_smoothing=smoothing)
        return loss, {"accuracy": (logits_BK.detach().argmax(1) == digits_B).float().mean()}

    return Task(
        models={"net": ResNet(args.channels, args.blocks)},
        train_data=Images(train, args),
        eval_data=Images(held_out),
        feeder=feed,
    )


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Images, float32 [1, H, W] from -1 to 1, and their classes; with `args`, augmented.

    What it draws comes from torch's generator, which harness seeds: a run that resumes draws what
    it would have drawn.
    """

    def __init__(self, data: digits.Digits, args: ImagesArgs | None = None) -> None:
        self.data, self.args = data, args

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pixels, digit = self.data[index]
        image_CHW = pixels.view(1, SIDE, SIDE)
        return image_CHW if self.args is None else augmented(image_CHW, self.args), digit


def augmented(image_CHW: Tensor, args: ImagesArgs) -> Tensor:
    """The image, turned about its center, scaled and shifted at random; outside of it is paper."""
    turn, scale, right, down = (torch.rand(4) * 2 - 1).tolist()
    angle, size = math.radians(args.turn * turn), 1 + args.scale * scale
    cos, sin = math.cos(angle) / size, math.sin(angle) / size
    pixel = 2 / SIDE * args.shift  # the grid's sides are 2 long
    back = torch.tensor([[[cos, -sin, pixel * right], [sin, cos, pixel * down]]])
    grid = F.affine_grid(back, [1, *image_CHW.shape], align_corners=False)
    ink_CHW = F.grid_sample((image_CHW + 1)[None], grid, align_corners=False)[0]
    return ink_CHW - 1


class ResNet(nn.Module):
    """Logits [B, K] of images [B, 1, H, W]: residual blocks, of which the second half sees half the
    resolution with twice the channels, and the mean over all pixels."""

    def __init__(self, channels: int, blocks: int) -> None:
        super().__init__()
        self.stem = convolution(1, channels)
        first = [Block(channels, channels) for _ in range(blocks)]
        second = [Block(2 * channels, 2 * channels) for _ in range(blocks - 1)]
        self.blocks = nn.Sequential(*first, Block(channels, 2 * channels, stride=2), *second)
        self.head = nn.Linear(2 * channels, CLASSES)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x_BCHW = self.blocks(F.relu(self.stem(images_BCHW)))
        return self.head(x_BCHW.mean((2, 3)))


class Block(nn.Module):
    """Two convolutions next to the identity, or next to a convolution if the shape changes."""

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.first = convolution(channels, out, stride)
        self.second = convolution(out, out)
        changes = stride > 1 or out != channels
        self.skip = convolution(channels, out, stride, side=1) if changes else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.second(F.relu(self.first(x_BCHW)))
        return F.relu(y_BCHW + self.skip(x_BCHW))


def convolution(channels: int, out: int, stride: int = 1, side: int = 3) -> nn.Sequential:
    """A convolution and its BatchNorm."""
    conv = nn.Conv2d(channels, out, side, stride, padding=side // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out))
