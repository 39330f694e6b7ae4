"""A model of LLaMA's shape, from sizes alone; it runs, so that its activations can be traced."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Attention and a gated feed-forward, each after a norm."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, ffn: int):
        super().__init__()
        self.head_size = hidden // heads
        self.groups = heads // kv_heads
        self.norm, self.ffn_norm = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.q = nn.Linear(hidden, hidden, bias=False)
        self.k = nn.Linear(hidden, self.head_size * kv_heads, bias=False)
        self.v = nn.Linear(hidden, self.head_size * kv_heads, bias=False)
        self.o = nn.Linear(hidden, hidden, bias=False)
        self.gate = nn.Linear(hidden, ffn, bias=False)
        self.up = nn.Linear(hidden, ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[batch, positions, hidden] -> the same."""
        y = self.norm(x)
        q, k, v = (
            part(y).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        if self.groups > 1:
            k, v = (part.repeat_interleave(self.groups, 1) for part in (k, v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        y = self.ffn_norm(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """A causal language model. `kv_heads` 0: as many as `heads`."""

    def __init__(
        self, layers: int, hidden: int, heads: int, ffn: int, vocabulary: int, kv_heads: int = 0
    ):
        super().__init__()
        self.head_size = hidden // heads
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.blocks = nn.ModuleList(
            Block(hidden, heads, kv_heads or heads, ffn) for _ in range(layers)
        )
        self.norm = nn.RMSNorm(hidden)
        self.head = nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """The loss of `labels`, [batch, positions] like `input_ids`."""
        x = self.embedding(input_ids)
        half = torch.arange(self.head_size // 2, device=x.device) / (self.head_size / 2)
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * 1e4**-half
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = self.head(self.norm(x)).float()
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
