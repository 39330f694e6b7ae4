"""Layers of bitsandbytes in the place of torch's (extra: quant). Its optimizers are in optim/."""

import importlib
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

_bnb: Any = importlib.import_module("bitsandbytes")


class Int8Linear(nn.Linear):
    """`nn.Linear` that multiplies in int8 (Dettmers et al., "LLM.int8()", 2022).

    The weight stays of the model's dtype and is trained; it is rounded anew in every forward, where
    `bitsandbytes.nn.Linear8bitLt` keeps rounded ones for as long as it sees a gradient, of which
    ZeRO leaves it none. What is multiplied goes through fp16, and must fit in there.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        output = _bnb.matmul(input.reshape(-1, self.in_features), self.weight)
        output = output.view(*input.shape[:-1], self.out_features)
        return output if self.bias is None else output + self.bias


class StableEmbedding(_bnb.nn.StableEmbedding):
    """bitsandbytes' embedding with a layer norm after it, which is done in fp32 here in any dtype.

    Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2021. bitsandbytes' optimizers
    keep 32-bit state for its weight where they step it itself: at ZeRO 0 in fp32.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[...] of indices -> [..., embedding_dim], in the weight's dtype."""
        found = nn.Embedding.forward(self, input)
        norm = self.norm
        weight, bias = norm.weight.float(), norm.bias.float()
        return F.layer_norm(found.float(), norm.normalized_shape, weight, bias, norm.eps).to(found)


def stable_embedding(old: nn.Embedding) -> StableEmbedding:
    """With a layer norm that is new, so the model computes something else, and learns to."""
    return StableEmbedding(
        old.num_embeddings,
        old.embedding_dim,
        old.padding_idx,
        old.max_norm,
        old.norm_type,
        old.scale_grad_by_freq,
        old.sparse,
    )
