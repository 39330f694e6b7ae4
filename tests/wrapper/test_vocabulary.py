"""A vocabulary that grows, with its head."""

import pytest
import torch
from torch import Tensor, nn

from harness.errors import ConfigError
from harness.wrapper import (
    resize_modules,
)


class Tied(nn.Module):
    def __init__(self, tied: bool):
        super().__init__()
        self.embed = nn.Embedding(10, 4, padding_idx=0)
        self.head = nn.Linear(4, 10)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


@pytest.mark.parametrize(("tied", "include"), [(True, "embed"), (False, "embed|head")])
def test_a_vocabulary_grows_with_its_head(tied: bool, include: str) -> None:
    model = Tied(tied).to(torch.bfloat16)
    model.head.bias.requires_grad_(False)
    tokens = torch.arange(10)
    before, rows = model(tokens), model.embed.weight.detach().clone()
    changes = resize_modules(model, include, 13)
    assert [str(c) for c in changes] == ["embed: 10 rows -> 13 rows", "head: 10 rows -> 13 rows"]
    assert (model.head.weight is model.embed.weight) == tied
    assert model.embed.weight.dtype == torch.bfloat16
    assert (model.head.bias.requires_grad, model.head.weight.requires_grad) == (False, True)
    assert torch.equal(model(tokens)[:, :10], before)
    assert torch.equal(model.embed.weight[10:], rows.float().mean(0).bfloat16().expand(3, 4))
    assert (model.embed.num_embeddings, model.head.out_features) == (13, 13)
    model(torch.tensor([12])).sum().backward()


class SharedBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(4, 6)
        self.other = nn.Linear(3, 6)
        self.bias = self.other.bias = self.decoder.bias


def test_a_shared_bias_stays_shared() -> None:
    model = SharedBias()
    changes = resize_modules(model, "decoder", 8)
    assert list(map(str, changes)) == [
        "decoder: 6 rows -> 8 rows",
        "other: 6 rows -> 8 rows",
    ]
    assert model.bias is model.decoder.bias is model.other.bias
    assert (model.bias.shape, model.other.weight.shape) == ((8,), (8, 3))


@pytest.mark.parametrize(
    ("include", "size", "message"),
    [
        ("embed", 9, "'embed' has 10 rows, more than 9"),
        ("nothing", 11, "'nothing' matches no module of Tied"),
        ("", 11, "'' is a Tied, expected an Embedding or a Linear"),
    ],
)
def test_an_impossible_size_is_refused(include: str, size: int, message: str) -> None:
    model = Tied(True)
    with pytest.raises(ConfigError, match=message):
        resize_modules(model, include, size)
    assert len(model.embed.weight) == len(model.head.weight) == 10
