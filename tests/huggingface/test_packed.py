"""A model whose attention crosses packed documents is refused (extra: hf)."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from harness.errors import ConfigError
from harness.huggingface.packed import CheckPacking
from tests.support import hf_folders

pytest.importorskip("transformers", reason="needs the extra: hf")


class Crossing(nn.Module):
    """A model that is given a mask, with which transformers does not look at positions."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, **options: Any) -> Any:
        return self.model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **options)


def check(model: nn.Module) -> None:
    @contextmanager
    def lend(name: str) -> Iterator[nn.Module]:
        yield model

    class Engines(dict[str, Any]):
        def __init__(self) -> None:
            super().__init__(lm=SimpleNamespace(device=torch.device("cpu")))
            self.lend = lend

    run: Any = SimpleNamespace(engines=Engines())
    CheckPacking("lm").on_start(run)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_attention_that_crosses_documents_is_refused(name: str) -> None:
    model = hf_folders.model_of(hf_folders.config_of(name))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    check(model)
    with pytest.raises(ConfigError, match="attention of Crossing crosses packed documents"):
        check(Crossing(model))
