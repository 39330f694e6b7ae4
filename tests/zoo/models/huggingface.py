"""Models of transformers, tiny, built from configs (extra: hf)."""

from typing import Any

import torch
from torch import Generator, Tensor, nn

from tests.zoo.data import SAMPLES, tokens
from tests.zoo.entry import entry

SIZES: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {"num_attention_heads": 2, "intermediate_size": 24}
DRY: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def labelled(generator: Generator, number: int) -> dict[str, Tensor]:
    """Words as inputs and as labels."""
    (words,) = tokens(generator, number)
    return {"input_ids": words, "labels": words}


@entry(labelled, autocast=True)
def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {"vocab_size": 32, "n_positions": 16, "n_embd": 16, "n_layer": 2}
    dry: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **dry, n_head=2, use_cache=False))


@entry(labelled, autocast=True)
def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SIZES, **HEADS, num_key_value_heads=1, use_cache=False)
    return LlamaForCausalLM(config)


@entry(labelled)
def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**SIZES, **HEADS, **DRY, max_position_embeddings=16))


@entry(labelled)
def t5() -> nn.Module:
    """Its encoder and decoder share the embedding."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes: dict[str, Any] = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2}
    start: dict[str, Any] = {"decoder_start_token_id": 0}
    config = T5Config(**sizes, **start, num_layers=2, dropout_rate=0.0, use_cache=False)
    return T5ForConditionalGeneration(config)


def captioned(generator: Generator, number: int) -> dict[str, Any]:
    """Images and captions for CLIP."""
    (words,) = tokens(generator, number)
    pixels = torch.randn(SAMPLES, 3, 8, 8, generator=generator)
    return {"input_ids": words + 1, "pixel_values": pixels, "return_loss": True}


@entry(captioned, bf16=2e-1)
def clip() -> nn.Module:
    """Its temperature is a 0-dim parameter."""
    from transformers import CLIPConfig, CLIPModel

    text: dict[str, Any] = SIZES | HEADS | {"max_position_embeddings": 16, "eos_token_id": 31}
    image = HEADS | {"hidden_size": 16, "num_hidden_layers": 2, "image_size": 8, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=image, projection_dim=8))
