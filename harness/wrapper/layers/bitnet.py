"""Linear layers with ternary weights and 8-bit activations, trained from scratch.

Wang et al., "BitNet: Scaling 1-bit Transformers for Large Language Models", 2023; the weights as in
Ma et al., "The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits", 2024. The papers
normalise a layer's input inside the layer; this one leaves that to the model.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class BitLinear(nn.Linear):
    """`nn.Linear` that computes with quantized inputs and weights. The weights keep full precision,
    and get gradients by the straight-through estimator."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return F.linear(
            _straight_through(input, eight_bit(input)),
            _straight_through(self.weight, ternary(self.weight)),
            self.bias,
        )


def ternary(weight: Tensor) -> Tensor:
    """Each weight rounded to -m, 0 or m, where m is the mean absolute value (absmean)."""
    mean = weight.abs().mean().clamp(min=1e-5)
    return (weight / mean).round().clamp(-1, 1) * mean


def eight_bit(input: Tensor) -> Tensor:
    """Each row [..., features] in multiples of its largest absolute value / 127 (absmax)."""
    step = input.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
    return (input / step).round() * step


def _straight_through(tensor: Tensor, quantized: Tensor) -> Tensor:
    return tensor + (quantized - tensor).detach()
