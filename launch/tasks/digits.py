"""The handwritten digits that scikit-learn ships, for the tasks next to this file.

1797 images of 8 x 8 pixels: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI
Machine Learning Repository, 1998.
"""

import torch
from torch import Tensor
from torch.utils.data import Dataset

from harness.errors import ConfigError

PIXELS = 64
HELD_OUT = 297
"""The last images, by other writers."""


class Digits(Dataset[tuple[Tensor, Tensor]]):
    """Images, float32 [P] from -1 (paper) to 1 (ink), and their digits, int64."""

    def __init__(self, images_NP: Tensor, digits_N: Tensor) -> None:
        self.images_NP, self.digits_N = images_NP, digits_N

    def __len__(self) -> int:
        return len(self.images_NP)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images_NP[index], self.digits_N[index]


def split(images_NP: Tensor, digits_N: Tensor) -> tuple[Digits, Digits]:
    """`(train, held_out)`: all but the last images, and those."""
    at = len(images_NP) - HELD_OUT
    return Digits(images_NP[:at], digits_N[:at]), Digits(images_NP[at:], digits_N[at:])


def read() -> tuple[Tensor, Tensor]:
    """All images and their digits. Raises ConfigError if scikit-learn is not installed."""
    try:
        from sklearn.datasets import load_digits  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            f"this task learns from the digits of scikit-learn ({error}): pip install scikit-learn"
        ) from None
    images, classes = load_digits(return_X_y=True)
    images_NP = torch.tensor(images, dtype=torch.float32) / 8 - 1
    return images_NP, torch.tensor(classes, dtype=torch.int64)
