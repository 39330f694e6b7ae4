"""BitLinear: what it computes, and a run that learns with it."""

from pathlib import Path

import torch

from harness.run import run_in_world
from harness.testing.pool import RankPool
from harness.wrapper.layers.bitnet import BitLinear, eight_bit, ternary
from tests.support.helpers import losses, tiny_config


def test_bitnet_computes_with_three_weights_and_lets_gradients_through() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = BitLinear(8, 4)
    x = torch.randn(3, 8, generator=generator, requires_grad=True)
    mean = layer.weight.abs().mean()
    quantized = ternary(layer.weight) / mean
    assert set(quantized.round(decimals=5).unique().tolist()) == {-1.0, 0.0, 1.0}
    levels = eight_bit(x) / x.abs().amax(-1, keepdim=True) * 127
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
    assert (eight_bit(x) - x).abs().max() <= x.abs().max() / 254 + 1e-6
    y = layer(x)
    torch.testing.assert_close(y, eight_bit(x) @ ternary(layer.weight).T + layer.bias)
    y.sum().backward()
    assert layer.weight.grad is not None and x.grad is not None
    torch.testing.assert_close(layer.weight.grad, eight_bit(x).sum(0).expand(4, 8))
    torch.testing.assert_close(x.grad, ternary(layer.weight).sum(0).expand(3, 8))
    assert torch.equal(ternary(torch.zeros(2, 2)), torch.zeros(2, 2))


def test_a_run_with_bitnet_learns(two_ranks: RankPool, tmp_path: Path) -> None:
    entry = {
        "what": "torch.nn:Linear",
        "by": "harness.wrapper.layers.bitnet:BitLinear",
        "exclude": "first|last",
    }
    config = tiny_config(tmp_path, 2, optimizations={"replace": [entry]}, run={"steps": 30})
    two_ranks.run(run_in_world, config)
    found = losses(config)
    assert sum(found[-3:]) < 0.8 * sum(found[:3])
