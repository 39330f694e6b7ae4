"""A model of Hugging Face's transformers, from a local folder to a local folder (extra: hf).

Any causal, masked or seq2seq model; texts, prompts with completions, or chats; padded or packed;
all weights or adapters; any ZeRO stage. docs/huggingface.md.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from torch import Tensor
from torch.utils.data import Dataset

from harness.config import Config, Section
from harness.config.paths import expand_path
from harness.data.packing import Packed, count_labels
from harness.data.token_files import Documents, TokenFile
from harness.errors import ConfigError
from harness.huggingface.export import FolderExport
from harness.huggingface.generate import generate_command
from harness.huggingface.models import Description, describe, load_tokenizer
from harness.huggingface.packed import CheckPacking
from harness.huggingface.rows import read_rows
from harness.huggingface.samples import Collate, Samples, packed
from harness.huggingface.weights import FolderWeights
from harness.task import Stats, Task
from harness.utils import to_device

FilePath = Annotated[Path, BeforeValidator(expand_path)]


class HFArgs(Section):
    """[task] args = {...} of this task."""

    model: FilePath
    """A folder with config.json, and with weights to begin with, if it has any; or a config.json
    alone."""
    tokenizer: FilePath | None = None
    """A folder with a tokenizer. Default: `model`."""
    kind: Literal["causal", "masked", "seq2seq"] | None = None
    """"causal", "masked" or "seq2seq". Default: what the config says."""
    train: FilePath
    """Text files, JSONL, Parquet, a folder of these, or what datasets' save_to_disk has written; or
    a corpus of `harness data prepare`, which needs `packing`."""
    eval: FilePath | None = None
    """Held-out data of the same forms."""
    field: str = "text"
    """The field of a row that is learned, if it has neither messages nor a completion."""
    seq_len: int = Field(default=1024, ge=2)
    """Tokens in a window of packed documents; a sample that is not packed is cut after them."""
    packing: Literal["first_fit", "greedy", "concatenate"] | None = None
    """How documents are packed into windows (docs/data.md), for causal models. Default: one in a
    sample, padded."""
    mask_share: float = Field(default=0.15, gt=0, lt=1)
    """Share of the tokens that a masked model has to predict."""
    shard_size: str = "5GB"
    """Size of the largest file of an export's weights."""
    generate: dict[str, Any] = Field(default={"max_new_tokens": 64})
    """Options of the command `generate`: those of transformers' `generate`."""


def build(config: Config) -> Task:
    """The task of `config.task.args`, with one engine, of any name.

    Raises ConfigError for files that are missing or do not fit.
    """
    args = HFArgs.model_validate(config.task.args)
    (engine, settings) = next(iter(config.engines.items()))
    if not args.model.exists():
        raise ConfigError(f"task.args.model: no such file or folder: {args.model.absolute()}")
    folder = args.model if args.model.is_dir() else args.model.parent
    tokenizer = load_tokenizer(args.tokenizer or folder)
    model = describe(args.model, args.kind, len(tokenizer))
    check(args, model)
    grows = model.folder is not None and len(tokenizer) > model.folder_vocabulary
    if settings.lora is not None and grows:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, the weights in {model.folder} have rows "
            f"for {model.folder_vocabulary}, and adapters do not contain the new ones: train "
            "without lora first, or use this model's own tokenizer"
        )
    train, is_chat = dataset(args.train, tokenizer, model, args)
    commands = {}
    if model.kind != "masked":
        commands["generate"] = generate_command(
            engine, tokenizer, model.kind, is_chat=is_chat, options=args.generate
        )
    return Task(
        models={engine: model.build},
        train_data=train,
        eval_data=None if args.eval is None else dataset(args.eval, tokenizer, model, args)[0],
        feeder=Feeder(model),
        collate=Collate(tokenizer, model.kind, args.mask_share),
        weigh=count_labels,
        count=lambda batch: (len(batch["input_ids"]), batch["input_ids"].numel()),
        init_weights={engine: FolderWeights(engine, model)},
        exporters={engine: FolderExport(tokenizer, args.shard_size)},
        commands=commands,
        callbacks=[CheckPacking(engine)] if args.packing else [],
    )


def check(args: HFArgs, model: Description) -> None:
    """Raises ConfigError for arguments that do not fit the model."""
    if args.packing and model.kind != "causal":
        raise ConfigError(f"task.args.packing: only for causal models, found a {model.kind} one")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and args.seq_len > longest:
        raise ConfigError(f"task.args.seq_len = {args.seq_len}: the model has {longest} positions")


def dataset(
    path: Path, tokenizer: Any, model: Description, args: HFArgs
) -> tuple[Dataset[Any], bool]:
    """`(samples or windows, whether they are chats)`. Raises ConfigError for what cannot be read,
    and for a first row that cannot be tokenized, or has nothing to learn."""
    if path.with_suffix(".idx").is_file():
        if args.packing is None:
            raise ConfigError(f"{path} is a corpus of tokens: set task.args.packing")
        corpus = TokenFile(path)
        if (most := int(corpus.tokens.max(initial=0))) >= len(tokenizer):
            raise ConfigError(
                f"{path}: token {most} is not one of the tokenizer's {len(tokenizer)}"
            )
        return Packed(Documents(corpus), args.seq_len, method=args.packing), False
    rows = read_rows(path)
    samples = Samples(rows, tokenizer, model.kind, args.seq_len, args.field)
    if model.kind != "masked" and not (samples[0]["labels"] >= 0).any():
        raise ConfigError(f"{path}: row 0 has no label in its first {args.seq_len} tokens")
    is_chat = isinstance(rows[0].get("messages"), list)
    return packed(samples, args.packing) if args.packing else samples, is_chat


class Feeder:
    """`(engine, batch) -> (loss, stats)`: the model's own loss, the mean over labels that count."""

    def __init__(self, model: Description):
        self.options = {} if model.kind == "masked" else {"use_cache": False}

    def __call__(self, engine: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Stats]:
        output = engine(**to_device(batch, engine.device, engine.dtype), **self.options)
        return output.loss, {}
