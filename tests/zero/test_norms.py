"""The norm of the gradients, where DeepSpeed only clips by it."""

import torch
from torch import nn

from harness.testing.pool import RankPool
from harness.zero.norms import PlainGradients


def clipped(largest: float) -> tuple[list[torch.Tensor], list[torch.Tensor], float, float]:
    """Gradients that we have clipped, and that DeepSpeed has; both norms."""
    from deepspeed.runtime.utils import clip_grad_norm_

    torch.manual_seed(0)
    found = []
    model = nn.Sequential(*(nn.Linear(n, 7) for n in range(1, 60)), nn.LayerNorm(5))
    model[3].requires_grad_(False)
    start = [torch.randn_like(p) if p.requires_grad else None for p in model.parameters()]
    for ours in (True, False):
        for parameter, gradient in zip(model.parameters(), start, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        if ours:
            gradients = PlainGradients(model)
            gradients.clip(largest)
            norm = gradients.norm
        else:
            norm = float(clip_grad_norm_(model.parameters(), largest))
        found.append(([p.grad for p in model.parameters() if p.grad is not None], norm))
    (own, norm), (theirs, other) = found
    return own, theirs, norm, other


def test_gradients_are_clipped_as_by_deepspeed_to_the_bit(two_ranks: RankPool) -> None:
    *_, norm = two_ranks.run(clipped, 1e9)[0]
    for share in (0.3, 0.98, 0.995, 1.0, 1.0001, 3.0):
        for own, theirs, found, other in two_ranks.run(clipped, share * norm):
            assert found == other
            assert all(map(torch.equal, own, theirs))
