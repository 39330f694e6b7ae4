"""Random blobs in place of scikit-learn's digits, for the tasks that learn from those."""

from unittest.mock import patch

import digits
import torch
from torch import Tensor

from harness.config import Config
from harness.run import run_in_world


def fake_digits() -> tuple[Tensor, Tensor]:
    """Images [N, P] around ten centres, and their classes [N], as of `digits.read`."""
    generator = torch.Generator().manual_seed(0)
    digits_N = torch.randint(10, (digits.HELD_OUT + 200,), generator=generator)
    centres_CP = torch.randn(10, digits.PIXELS, generator=generator)
    noise_NP = torch.randn(len(digits_N), digits.PIXELS, generator=generator)
    return torch.tanh(centres_CP[digits_N] + 0.3 * noise_NP), digits_N


def train_on_fake_digits(config: Config) -> None:
    """A run, on a rank of a pool."""
    with patch.object(digits, "read", fake_digits):
        run_in_world(config)
