"""The config of a folder, and the model that it describes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from harness.errors import ConfigError
from harness.huggingface.library import transformers

Kind = Literal["causal", "masked", "seq2seq", "other"]
"""What a model predicts: the next token, masked tokens, a text from another one; or something else,
like which image belongs to a caption."""

AUTO_CLASSES: dict[Kind, str] = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "other": "AutoModel",
}
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class Description:
    """A model that is not built yet."""

    kind: Kind
    config: Any
    """Its PretrainedConfig, with `vocabulary` tokens."""
    generation_config: Any | None
    """Its GenerationConfig, if the folder has one."""
    folder: Path | None
    """Where its weights are; None: it begins with new ones."""
    folder_vocabulary: int
    """Tokens in the vocabulary of these weights."""

    def build(self) -> nn.Module:
        """The model with new weights, float32.

        Under `zero.Init` too they are those that transformers gives it: what its `_init_weights`
        touches is gathered (zero/sharded_init.py). transformers' own support of ZeRO 3 must be off:
        then it would shard the model a second time. Raises ConfigError if it is on.
        """
        library = transformers()
        if library.integrations.is_deepspeed_zero3_enabled():
            raise ConfigError(
                "transformers shards models for ZeRO 3 by itself, since an HfDeepSpeedConfig is "
                "alive in this process, as of TrainingArguments(deepspeed=...): delete it"
            )
        build = getattr(library, AUTO_CLASSES[self.kind]).from_config
        model = build(self.config, dtype=torch.float32)
        if self.generation_config is not None:
            model.generation_config = self.generation_config
        return model


def describe(path: Path, kind: Kind | None = None, vocabulary: int = 0) -> Description:
    """The model of a folder (`config.json`, and weights if it has any), or of a config alone.

    `kind` None: what the config says. The vocabulary is at least as large as `vocabulary`, the
    tokenizer's. Raises ConfigError.
    """
    library = transformers()
    path = path.absolute()
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"{path}: no config.json: expected a folder with one, or such a file")
    try:
        config = library.AutoConfig.from_pretrained(str(file.parent if path.is_dir() else file))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{file}: {error}") from None
    kind = kind or _kind_of(config, file)
    text_config = config.get_text_config()
    own = text_config.vocab_size
    text_config.vocab_size = max(own, vocabulary)
    has_weights = path.is_dir() and any(any(path.glob(pattern)) for pattern in WEIGHTS)
    generation_config = None
    if (file.parent / "generation_config.json").is_file() and kind != "masked":
        generation_config = library.GenerationConfig.from_pretrained(str(file.parent))
    if kind == "seq2seq" and getattr(config, "decoder_start_token_id", None) is None:
        raise ConfigError(f"{file}: decoder_start_token_id is missing: labels are shifted with it")
    return Description(kind, config, generation_config, path if has_weights else None, own)


def _kind_of(config: Any, file: Path) -> Kind:
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    (name, *_) = config.architectures or [""]
    if name.endswith("ForMaskedLM"):
        return "masked"
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal"
    auto = transformers().models.auto.modeling_auto
    known: dict[Kind, Any] = {
        "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "masked": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    }
    fits: list[Kind] = [kind for kind, names in known.items() if config.model_type in names]
    if len(fits) != 1:
        raise ConfigError(
            f"{file}: a model of type {config.model_type!r} may be {' or '.join(fits) or 'neither'}"
            ": set task.args.kind to causal, masked or seq2seq"
        )
    return fits[0]


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a folder. Raises ConfigError."""
    try:
        return transformers().AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"no tokenizer in {path}: {' '.join(str(error).split()):.300}") from None


def padding_token(tokenizer: Any) -> int:
    """The token that fills batches up: it is masked, and has no label, so that any will do."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in known if token is not None)
