"""The attention backend that a run is limited to."""

from pathlib import Path

import pytest
import torch

from harness.errors import ConfigError
from harness.testing.pool import RankPool
from harness.wrapper import (
    attention_backend,
)
from tests.support.helpers import error_of, tiny_config


def test_a_backend_without_a_kernel_is_an_error(two_ranks: RankPool, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, optimizations={"attention": "cudnn"})
    (error, _) = two_ranks.run(error_of, config)
    assert "attention = 'cudnn': no kernel for torch.float32 on cpu" in error
    assert not config.run_dir.exists()


def test_only_the_chosen_backend_is_used_and_an_unavailable_one_is_refused() -> None:
    cpu = torch.device("cpu")
    flags = torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.flash_sdp_enabled
    assert [flag() for flag in flags] == [True, True]
    with attention_backend("math", [torch.float32, torch.bfloat16], cpu):
        assert [flag() for flag in flags] == [True, False]
    message = "attention = 'cudnn': no kernel for torch.float32 on cpu"
    with pytest.raises(ConfigError, match=message):
        attention_backend("cudnn", [torch.float32], cpu).__enter__()
    assert [flag() for flag in flags] == [True, True]


def test_a_call_without_a_kernel_is_explained() -> None:
    """Flash attention on a CPU has no dropout."""
    x = torch.zeros(1, 1, 8, 64)
    message = "attention = 'flash': it has no kernel on cpu for a call in the model"
    with (
        pytest.raises(ConfigError, match=message),
        attention_backend("flash", [torch.float32], torch.device("cpu")),
    ):
        torch.nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5)
