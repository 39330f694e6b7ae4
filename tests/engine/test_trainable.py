"""Models that are refused before the first step, with the remedy."""

import re

import pytest
import torch
from torch import nn

from harness.engine.trainable import TrainedParameters, check_storable, check_trainable
from harness.errors import ConfigError, TaskError

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
