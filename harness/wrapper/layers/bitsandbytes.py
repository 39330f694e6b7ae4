"""bitsandbytes' replacements for torch's layers (pip install bitsandbytes).

Its optimizers are in optim/registry.py.
"""

import importlib
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

_bnb: Any = importlib.import_module("bitsandbytes")


class Int8Linear(nn.Linear):
    """`nn.Linear` that multiplies in int8 (Dettmers et al., "LLM.int8()", 2022).

    The weight keeps the model's dtype and is trained; it is quantized again in each forward.
    (`bitsandbytes.nn.Linear8bitLt` reuses the quantized weight while the weight has a gradient, and
    ZeRO leaves it none.) Both factors are cast to fp16 first, and must be within its range.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        output = _bnb.matmul(input.reshape(-1, self.in_features), self.weight)
        output = output.view(*input.shape[:-1], self.out_features)
        return output if self.bias is None else output + self.bias


class StableEmbedding(_bnb.nn.StableEmbedding):
    """bitsandbytes' embedding followed by a layer norm, which runs in fp32 for any weight dtype.

    Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2021. bitsandbytes' optimizers
    keep 32-bit state for its weight if they step the weight itself: at ZeRO stage 0 in fp32.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[...] of indices -> [..., embedding_dim], in the weight's dtype."""
        embedded = nn.Embedding.forward(self, input)
        norm = self.norm
        weight, bias = norm.weight.float(), norm.bias.float()
        normed = F.layer_norm(embedded.float(), norm.normalized_shape, weight, bias, norm.eps)
        return normed.to(embedded)


def stable_embedding(old: nn.Embedding) -> StableEmbedding:
    """Adds a new layer norm, so the model's outputs change."""
    return StableEmbedding(
        old.num_embeddings,
        old.embedding_dim,
        old.padding_idx,
        old.max_norm,
        old.norm_type,
        old.scale_grad_by_freq,
        old.sparse,
    )
