"""Folders as of Hugging Face's hub: a tiny config, a tokenizer trained here, maybe weights."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "a journey of a thousand miles begins with a single step",
    "all that glitters is not gold",
    "to be or not to be that is the question",
    "the early bird catches the worm but the second mouse gets the cheese",
    "where there is a will there is a way",
    "brevity is the soul of wit",
    "the rest is silence",
]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
MODELS = ("llama", "gpt2", "t5", "bert", "clip")

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {"num_attention_heads": 2, "intermediate_size": 24}


@cache
def tokenizer_json(size: int) -> str:
    """A byte-level BPE of the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[misc]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[misc]
    trainer: Any = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer.to_str()


def tokenizer(size: int = 300, *, pads: bool = True) -> Any:
    """A tokenizer with a chat template; without `pads` it has no token for padding."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer_json(size)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        pad_token="<pad>" if pads else None,
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def config_of(name: str, vocabulary: int = 300, **options: Any) -> Any:
    """The config of a tiny model."""
    import transformers

    hf: Any = transformers

    tokens: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    shared = tokens | {"vocab_size": vocabulary} | options
    match name:
        case "llama":
            more: dict[str, Any] = {"num_key_value_heads": 1, "max_position_embeddings": 64}
            made = hf.LlamaConfig(**(SIZES | HEADS | more | shared))
        case "gpt2":
            dry: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            sizes: dict[str, Any] = {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
            made = hf.GPT2Config(**(sizes | dry | shared))
        case "t5":
            sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_layers": 2}
            made = hf.T5Config(
                **(sizes | {"decoder_start_token_id": 0, "dropout_rate": 0.0} | shared)
            )
        case "bert":
            dry = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            more = dry | {"max_position_embeddings": 64}
            made = hf.BertConfig(**(SIZES | HEADS | more | shared))
            made.architectures = ["BertForMaskedLM"]
        case _:
            text = SIZES | HEADS | {"max_position_embeddings": 64} | shared
            image = SIZES | HEADS | {"image_size": 8, "patch_size": 4}
            made = hf.CLIPConfig(text_config=text, vision_config=image, projection_dim=8)
    return made


def model_of(config: Any, seed: int = 7) -> nn.Module:
    """The model of a config, its weights large enough that training changes what it says."""
    import transformers

    hf: Any = transformers

    torch.manual_seed(seed)
    kinds = {"t5": hf.AutoModelForSeq2SeqLM, "bert": hf.AutoModelForMaskedLM, "clip": hf.AutoModel}
    return kinds.get(config.model_type, hf.AutoModelForCausalLM).from_config(config)


def write_folder(
    folder: Path, name: str, *, weights: bool = True, tokens: int = 300, **options: Any
) -> Path:
    """A folder with the tiny model `name` and a tokenizer."""
    pads = options.pop("pads", True)
    config = config_of(name, **options)
    if weights:
        model: Any = model_of(config)
        model.save_pretrained(folder)
    else:
        config.save_pretrained(folder)
    tokenizer(tokens, pads=pads).save_pretrained(folder)
    return folder


def write_rows(path: Path, form: str = "text") -> Path:
    """Rows of a form: "text", "completion" or "messages"."""
    rows: list[dict[str, Any]] = []
    for text in TEXTS:
        words = text.split()
        prompt, completion = " ".join(words[:3]), " " + " ".join(words[3:])
        rows.append(
            {
                "text": {"text": text},
                "completion": {"prompt": prompt, "completion": completion},
                "messages": {
                    "messages": [
                        {"role": "user", "content": prompt},
                        {"role": "assistant", "content": completion},
                    ]
                },
            }[form]
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
