"""Models that are refused before the first step, with the remedy."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness.engine.trainable import (
    TrainedParameters,
    check_hooked,
    check_initialized,
    check_renormed,
    check_storable,
    check_trainable,
)
from harness.errors import ConfigError, TaskError
from harness.testing.pool import RankPool
from tests.support.helpers import Pools, tiny_config
from tests.support.small_loop import engines_of, train, weights_of

REFUSED = {
    "float64": (nn.Linear(2, 2).double(), "'weight' is torch.float64, expected .*model.float"),
    "complex": (
        nn.ParameterDict({"phase": nn.Parameter(torch.zeros(2, dtype=torch.complex64))}),
        "'phase' is torch.complex64, expected .*torch.view_as_complex",
    ),
    "sparse": (
        nn.Sequential(nn.Embedding(3, 2, sparse=True)),
        r"'0.weight' \(torch.float32\) would have sparse gradients.*with sparse=False",
    ),
    "sparse bag": (nn.EmbeddingBag(3, 2, sparse=True), "'weight' .*EmbeddingBag with sparse=False"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_deepspeed_cannot_train_is_refused(kind: str) -> None:
    model, message = REFUSED[kind]
    with pytest.raises(TaskError) as error:
        check_trainable("net", model)
    assert re.search(rf"engine 'net': parameter {message}.*engines.net.frozen", str(error.value))
    with pytest.raises(ConfigError, match="no trainable parameter"):
        check_trainable("net", model.requires_grad_(False))
    check_trainable("net", nn.ModuleList([model, nn.Linear(1, 1)]))


def test_a_parameter_without_a_shape_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.LazyLinear(3))
    with pytest.raises(TaskError, match=r"parameter '1\.weight' has no shape yet"):
        check_initialized("net", model)
    model(torch.zeros(1, 4))
    check_initialized("net", model)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_script_module_is_refused_where_it_would_need_hooks(stage: int) -> None:
    model = nn.Sequential(nn.Linear(4, 2), torch.jit.script(nn.Linear(2, 2)))
    config = tiny_config(Path(), stage).engines["net"]
    if stage == 3:
        with pytest.raises(TaskError, match="module '1' is compiled by torch"):
            check_hooked("net", model, config)
    else:
        check_hooked("net", model, config)


def renormed(stage: int = 0, bf16: bool = False) -> Any:
    """The error, or the weight after three steps, of an embedding that renormalizes itself."""
    embedding = nn.Embedding.from_pretrained(ROWS.clone(), freeze=False, max_norm=1.0)
    try:
        engines = engines_of(embedding, feed, stage, {"bf16": {"enabled": bf16}}, **SETTINGS)
    except TaskError as error:
        return str(error)
    train(engines, LOOKUPS)
    weight = weights_of(engines)["weight"]
    engines.close()
    return weight


def renormed_by_edits(stage: int, bf16: bool) -> torch.Tensor:
    """What the message advises."""

    def feed_renormed(engine: Any, batch: torch.Tensor) -> Any:
        with engine.edit_weights() as model:
            model.weight.data.renorm_(2, 0, 1)
        return feed(engine, batch)

    embedding = nn.Embedding.from_pretrained(ROWS.clone(), freeze=False)
    engines = engines_of(embedding, feed_renormed, stage, {"bf16": {"enabled": bf16}}, **SETTINGS)
    train(engines, LOOKUPS)
    weight = weights_of(engines)["weight"].float()
    engines.close()
    return weight


ROWS = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)) * 2
LOOKUPS = [torch.tensor([0, 1, 2, 3, 3, 3])] * 3  # all rows
SETTINGS = {"optimizer": {"name": "torch.optim:SGD", "lr": 0.5, "weight_decay": 0.0}}


def feed(engine: Any, batch: torch.Tensor) -> Any:
    return (engine(batch).float() - 1).square().sum(-1).mean(), {}


def plain_renormed() -> torch.Tensor:
    embedding = nn.Embedding.from_pretrained(ROWS.clone(), freeze=False, max_norm=1.0)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.5)
    for batch in LOOKUPS:
        optimizer.zero_grad()
        feed(embedding, batch)[0].backward()
        optimizer.step()
    return embedding.weight.detach()


@pytest.mark.parametrize(
    ("stage", "bf16"), [(0, False), (0, True), (1, False), (2, False), (3, False), (3, True)]
)
def test_an_embedding_with_max_norm_is_refused_where_its_changes_do_not_last(
    two_ranks: RankPool, stage: int, bf16: bool
) -> None:
    why = "undoes that" if stage or bf16 else "diverge"
    for error in two_ranks.run(renormed, stage, bf16):
        assert re.search(
            rf"'net': parameter 'weight' has max_norm = 1.0.*{why}.*model\.weight\.data\.renorm_"
            r"\(2, 0, 1\).*engines\.net\.frozen",
            error,
        )
    tolerance = 3e-2 if bf16 else 1e-6
    for weight in two_ranks.run(renormed_by_edits, stage, bf16):
        assert torch.allclose(weight, plain_renormed(), rtol=0, atol=tolerance)


def test_an_embedding_with_max_norm_trains_on_one_rank_in_fp32(pools: Pools) -> None:
    (weight,) = pools(1).run(renormed)
    assert torch.allclose(weight, plain_renormed(), rtol=0, atol=1e-6)


def test_a_bag_with_max_norm_is_refused_unless_it_is_frozen() -> None:
    model = nn.Sequential(nn.EmbeddingBag(3, 2, max_norm=2.0))
    config = tiny_config(Path(), 1).engines["net"]
    with pytest.raises(TaskError, match=r"'0.weight' has max_norm = 2.0.* the EmbeddingBag with"):
        check_renormed("net", model, config)
    check_renormed("net", model.requires_grad_(False), config)


def test_a_sparse_buffer_that_a_checkpoint_would_have_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].register_buffer("edges", torch.eye(2).to_sparse(), persistent=False)
    check_storable("net", model)
    model[0].register_buffer("edges", torch.eye(2).to_sparse())
    with pytest.raises(TaskError, match=r"buffer '0.edges' has the layout .*persistent=False"):
        check_storable("net", model)


def test_what_is_trained_cannot_change() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    trained = TrainedParameters("net", model)
    trained.check()
    model.requires_grad_(False)
    model.bias.requires_grad_(True)
    with pytest.raises(
        TaskError, match=r"changed during the run: weight, bias\. .* `lr net/GROUP 0`"
    ):
        trained.check()
    assert model.weight.requires_grad and not model.bias.requires_grad
