"""Models that are refused before the first step, with the remedy."""

import re

import pytest
import torch
from torch import nn

from harness.engine.trainable import check_trainable
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
