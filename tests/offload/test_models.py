"""Other people's models and adapters, without any change to their code (extras: hf, lora)."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from harness import offload
from tests.support.offload_models import gradients, one_thread, same

transformers = pytest.importorskip("transformers", reason="needs the extra: hf")


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with one_thread():
        yield


def llama(**settings: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = transformers.LlamaConfig(**sizes, **heads, attention_dropout=0.1, **settings)
    return transformers.LlamaForCausalLM(config).train()


def step(model: Any) -> list[Tensor]:
    """Loss, gradients and the random generator, of padded sequences."""
    torch.manual_seed(1)
    model.zero_grad()
    ids = torch.randint(96, (3, 48))
    mask = torch.ones_like(ids)
    mask[0, 40:] = 0
    loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
    loss.backward()
    return [loss.detach(), *gradients(model), torch.get_rng_state()]


def check(model: Any, mode: offload.Mode, blocks: int = 4) -> None:
    expected = step(model)
    plan = offload.attach(
        model, mode=mode, fraction="all", keep_last=0, min_bytes=0, host_bytes=1 << 24
    )
    assert len(plan.modules) == blocks
    assert {type(m).__name__ for m in plan.modules.values()} == {"LlamaDecoderLayer"}
    assert same(step(model), expected)
    assert same(step(model), expected)
    assert plan.store.pool.leased == 0
    size = 3 * 48 * 32 * 4
    moved = plan.stats().bytes_out
    assert moved >= 2 * 4 * size  # twice the stream of each block
    assert mode == "saved" or moved < 3 * 4 * size  # and once what the blocks share
    model.eval()
    generated = model.generate(input_ids=torch.ones(1, 4, dtype=torch.long), max_new_tokens=4)
    plan.detach()
    plain = model.generate(input_ids=torch.ones(1, 4, dtype=torch.long), max_new_tokens=4)
    assert torch.equal(generated, plain)


@pytest.mark.parametrize("mode", ["inputs", "saved"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_llama(mode: offload.Mode, attention: str, use_cache: bool) -> None:
    check(llama(attn_implementation=attention, use_cache=use_cache), mode)


@pytest.mark.parametrize("mode", ["inputs", "saved"])
def test_llama_with_its_own_checkpointing(mode: offload.Mode) -> None:
    model = llama()
    expected = step(model)
    model.gradient_checkpointing_enable()
    plan = offload.attach(
        model, mode=mode, fraction="all", keep_last=0, min_bytes=0, host_bytes=1 << 24
    )
    assert same(step(model), expected)
    plan.detach()


@pytest.mark.parametrize("mode", ["inputs", "saved"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_lora(mode: offload.Mode, dropout: float) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra: lora")
    adapter = peft.LoraConfig(
        r=4, lora_dropout=dropout, target_modules=["q_proj", "v_proj", "down_proj"]
    )
    model = peft.get_peft_model(llama(), adapter)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora" in name for name in trained)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # it starts as zero, with which nothing could be told apart
            torch.nn.init.normal_(parameter)
    check(model, mode)
