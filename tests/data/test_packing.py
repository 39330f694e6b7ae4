"""Packed documents: every token once, and gradients as of documents that are alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import default_collate

from harness.data.packing import (
    IGNORED,
    Method,
    Packed,
    block_mask,
    count_labels,
    pack,
    sequence_bounds,
)
from harness.data.token_files import Documents, TokenFile, TokenWriter
from launch.tasks.byte_lm import ByteLM, ByteLMArgs

METHODS: list[Method] = ["first_fit", "greedy", "concatenate"]


class Texts:
    """Documents in memory."""

    def __init__(self, lengths: list[int]) -> None:
        torch.manual_seed(0)
        self.lengths = lengths
        self._texts = [torch.randint(1, 64, (length,)) for length in lengths]

    def __getitem__(self, index: int) -> Tensor:
        return self._texts[index]


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.integers(0, 30), max_size=40),
    st.integers(2, 12),
    st.sampled_from(METHODS),
    st.integers(1, 5),
)
def test_every_token_is_in_one_window(
    lengths: list[int], length: int, method: Method, lookahead: int
) -> None:
    windows = list(pack(lengths, length, method, lookahead))
    pieces = sorted(piece for window in windows for piece in window)
    tokens = [(d, place) for d, start, end in pieces for place in range(start, end)]
    assert tokens == [(d, place) for d, total in enumerate(lengths) for place in range(total)]
    fills = [sum(end - start for _, start, end in window) for window in windows]
    assert all(0 < fill <= length for fill in fills)
    if method == "concatenate":
        assert all(fill == length for fill in fills[:-1])
    else:
        assert all((end - start == length) or end == lengths[d] for d, start, end in pieces)


def test_first_fit_leaves_less_padding() -> None:
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(5, 1, 3000).astype(int) + 1, 1024).tolist()
    shares = {
        method: sum(lengths) / (1024 * len(list(pack(lengths, 1024, method)))) for method in METHODS
    }
    assert shares["greedy"] < shares["first_fit"] < shares["concatenate"]
    assert shares["first_fit"] > 0.97
    assert shares["concatenate"] > 0.999


def test_a_window(tmp_path: Path) -> None:
    with TokenWriter(tmp_path / "a", "u2") as writer:
        writer.write([[11, 12, 13], [21], [31, 32, 33, 34, 35, 36, 37, 38, 39], []])
    windows = Packed(Documents(TokenFile(tmp_path / "a")), 7, pad=9)
    assert windows.pieces(0) == [(2, 0, 7)]
    assert windows.pieces(1) == [(0, 0, 3), (1, 0, 1), (2, 7, 9)]
    found = {name: value.tolist() for name, value in windows[1].items()}
    assert found == {
        "input_ids": [11, 12, 13, 21, 38, 39, 9],
        "labels": [-100, 12, 13, -100, -100, 39, -100],
        "position_ids": [0, 1, 2, 0, 0, 1, 0],
    }
    assert windows.efficiency == 13 / 14
    with pytest.raises(IndexError):
        windows[2]
    batch = default_collate([windows[0], windows[1]])
    assert count_labels(batch) == 6 + 3
    bounds, longest = sequence_bounds(batch["position_ids"])
    assert bounds.tolist() == [0, 7, 10, 11, 13, 14]
    assert bounds.dtype == torch.int32
    assert longest == 7
    mask = block_mask(batch["position_ids"])
    assert mask.shape == (2, 1, 7, 7)
    assert mask[0, 0].tolist() == torch.ones(7, 7).tril().bool().tolist()
    assert mask[1, 0].int().tolist()[2:6] == [
        [1, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 0],
    ]


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="length = 1"):
        Packed(Texts([3]), 1)
    with pytest.raises(ValueError, match="no tokens"):
        Packed(Texts([0, 0]), 4)
    wrong: Any = "best"
    with pytest.raises(ValueError, match=r"'best'.*'first_fit'"):
        pack([3], 4, wrong)


def models() -> dict[str, Any]:
    """Small models, as functions `(model, batch) -> logits`, in fp32."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    llama = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    gpt2 = GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    )

    def of_hf(model: Any, batch: dict[str, Tensor]) -> Tensor:
        names = ("input_ids", "position_ids")
        return model(**{name: batch[name] for name in names}, use_cache=False).logits

    def of_bytes(model: Any, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["input_ids"], block_mask(batch["position_ids"]))

    return {
        "byte_lm": (ByteLM(ByteLMArgs(dim=32, layers=2)), of_bytes),
        "llama": (LlamaForCausalLM(llama), of_hf),
        "gpt2": (GPT2LMHeadModel(gpt2), of_hf),
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["byte_lm", "llama", "gpt2"])
def test_packed_gradients_equal_those_of_documents_alone(name: str, method: Method) -> None:
    torch.manual_seed(1)
    model, logits_of = models()[name]
    texts = Texts([9, 1, 30, 4, 2, 17, 1, 1, 12, 16])
    windows = Packed(texts, 16, method=method)
    batch = default_collate([windows[index] for index in range(len(windows))])
    labels = batch["labels"]
    logits = logits_of(model, batch)[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    loss.backward()
    packed = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    total, count = torch.zeros(()), 0
    for index in range(len(windows)):
        for document, start, end in windows.pieces(index):
            if end - start < 2:
                continue
            tokens = texts[document][None, start:end]
            alone = {"input_ids": tokens, "position_ids": torch.arange(end - start)[None]}
            logits = logits_of(model, alone)[0, :-1]
            total = total + F.cross_entropy(logits, tokens[0, 1:], reduction="sum")
            count += end - start - 1
    assert count == count_labels(batch)
    (total / count).backward()
    torch.testing.assert_close(loss, total / count, rtol=0, atol=1e-6)
    assert len(packed) == len(list(model.parameters()))
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(packed[key], parameter.grad, rtol=0, atol=1e-6, msg=key)
