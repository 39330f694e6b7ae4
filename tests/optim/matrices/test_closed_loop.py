"""A small transformer that Muon or SOAP trains under ZeRO learns what a plain loop in one process
does: with its own gradients, and the same global batch in one or in four micro-batches a step."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from harness import distributed
from harness.optim import Muon, Soap, matrix_param_groups
from harness.testing.pool import RankPool
from tests.optim.matrices.test_muon import worst
from tests.support.small_loop import engines_of, weights_of

WIDTH, HEADS, WORDS, STEPS = 12, 2, 61, 12
"""More words than the width: a direction without a gradient SOAP moves by rounding alone."""
SETTINGS: dict[str, dict[str, Any]] = {
    "muon": {"lr": 1e-2, "adam_lr": 3e-3, "weight_decay": 0.1},
    "soap": {
        "lr": 3e-3,
        "weight_decay": 0.1,
        "precondition_frequency": 4,
        "max_precond_dim": WIDTH,
    },
}
"""SOAP has no basis for a longer side: the first ones of those are rounding in part."""


class Block(nn.Module):
    """Without biases: the keys' has no gradient. Nor has a direction behind a LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 30, bias=False)
        self.down = nn.Linear(30, WIDTH, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        batch, time, _ = x_BTD.shape
        split = self.qkv(self.norm(x_BTD)).view(batch, time, 3 * HEADS, -1).transpose(1, 2)
        mixed = scaled_dot_product_attention(*split.chunk(3, dim=1), is_causal=True)
        x_BTD = x_BTD + self.out(mixed.transpose(1, 2).flatten(2))
        return x_BTD + self.down(torch.tanh(self.up(x_BTD)))


def transformer() -> nn.Module:
    torch.manual_seed(5)
    embed, head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
    return nn.Sequential(embed, Block(), Block(), head)


def batches() -> list[Tensor]:
    """16 sequences each, of a rule that can be learnt."""
    generator = torch.Generator().manual_seed(6)
    starts = torch.randint(WORDS, (STEPS, 16, 1), generator=generator)
    return list((starts + 3 * torch.arange(17)) % WORDS)


def loss_of(net: Any, words_BT: Tensor) -> Tensor:
    return cross_entropy(net(words_BT[:, :-1]).flatten(0, 1), words_BT[:, 1:].flatten())


def feed(engine: Any, words_BT: Tensor) -> tuple[Tensor, dict[str, Any]]:
    return loss_of(engine, words_BT), {}


def groups_of(net: nn.Module, **settings: Any) -> Any:
    return matrix_param_groups(net, dense="0|3", heads={"qkv": 3}, **settings)


def trained(stage: int, name: str, accumulation: int) -> tuple[list[float], dict[str, Tensor]]:
    """Losses, means over the ranks, and the weights."""
    optimizer = {"name": name, "dense": "0|3", "heads": {"qkv": 3}} | SETTINGS[name]
    ds = {"gradient_accumulation_steps": accumulation}
    engines = engines_of(transformer(), feed, stage, ds, optimizer=optimizer)
    engines.train()
    rank, world = distributed.global_rank(), distributed.world_size()
    losses = []
    for batch in batches():
        own = batch.chunk(world)[rank].chunk(accumulation)
        losses.append([float(engines.step(part)["loss"]) for part in own])
        engines.global_step += 1
    weights = weights_of(engines)
    engines.close()
    return torch.tensor(distributed.all_gather(losses)).mean((0, 2)).tolist(), weights


def plain(name: str) -> tuple[list[float], nn.Module]:
    net = transformer()
    settings, kind = dict(SETTINGS[name]), Muon if name == "muon" else Soap
    optimizer: Any = kind(groups_of(net, lr=settings["lr"]), **settings)
    losses = []
    for batch in batches():
        optimizer.zero_grad()
        loss = loss_of(net, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, net


CASES = [(s, name, a) for s in (0, 1, 2, 3) for name in SETTINGS for a in (1, 4)]
QUICK = {(3, "muon", 4), (2, "soap", 1)}


@pytest.mark.parametrize(
    ("stage", "name", "accumulation"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES],
)
def test_it_learns_as_a_plain_loop(
    two_ranks: RankPool, stage: int, name: str, accumulation: int
) -> None:
    expected, net = plain(name)
    assert expected[-1] < 0.9 * expected[0]
    losses, weights = two_ranks.run(trained, stage, name, accumulation)[0]
    assert losses == pytest.approx(expected, abs=3e-6)
    found = [weights[n] for n, _ in net.named_parameters()]
    assert worst(found, list(net.parameters())) <= 1e-4
