"""A language model on corpora of tokens, made by `harness data prepare`: packed documents, and a
mixture of several corpora.

The model is that of `byte_lm.py`, with a vocabulary. Tensor names end in their shape: B batch, T
time, V vocabulary.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch.nn.functional as F
from byte_lm import ByteLM, TransformerArgs
from pydantic import Field
from torch import Tensor

from harness.config import Config
from harness.data.packing import Packed, block_mask, count_labels
from harness.data.token_files import Documents, TokenFile
from harness.errors import ConfigError
from harness.task import Stats, Task


class LMArgs(TransformerArgs):
    """[task] args = {...} of this task."""

    corpus: Path | None = None
    """The corpus to learn from, if there are no `[data.mix.NAME]`, each with its `source`."""
    eval_corpus: Path | None = None
    """The held-out corpus."""
    vocabulary: int = Field(ge=2)
    """Number of tokens in the vocabulary; `harness data prepare` prints it."""
    seq_len: int = Field(default=512, ge=2)
    """Tokens in a window."""
    packing: Literal["first_fit", "greedy", "concatenate"] = "first_fit"
    """How documents are packed into windows: see harness/data/packing.py."""


def build(config: Config) -> Task:
    """The task of `config.task.args`, with one engine, "lm".

    Raises ConfigError for a corpus that does not exist, is damaged, or does not fit the vocabulary.
    """
    args = LMArgs.model_validate(config.task.args)
    if config.data.mix:
        sources = {name: Path(mixed.source) for name, mixed in config.data.mix.items()}
        train: Any = {
            name: packed(source, args, f"data.mix.{name}.source")
            for name, source in sources.items()
        }
    elif args.corpus is not None:
        train = packed(args.corpus, args, "task.args.corpus")
    else:
        raise ConfigError("set task.args.corpus, or the source of each [data.mix.NAME]")
    held_out = args.eval_corpus
    return Task(
        models={"lm": lambda: ByteLM(args, args.vocabulary)},
        train_data=train,
        eval_data=None if held_out is None else packed(held_out, args, "task.args.eval_corpus"),
        feeder=feed,
        weigh=count_labels,
        count=lambda batch: (len(batch["labels"]), batch["labels"].numel()),
    )


def packed(path: Path, args: LMArgs, key: str) -> Packed:
    """A corpus in windows. Raises ConfigError, about `key`."""
    try:
        corpus = TokenFile(path)
        most = int(corpus.tokens.max(initial=0))
        if most >= args.vocabulary:
            raise ValueError(f"token {most} is outside of the vocabulary, {args.vocabulary}")
        return Packed(Documents(corpus), args.seq_len, method=args.packing)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: {error}") from None


def feed(engine: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Stats]:
    """Predicts every token from those before it in its document.

    Returns the mean cross entropy over the labels that count, in nats (float32, 0-dim), and
    {"accuracy": the share of them whose most likely prediction is right}.
    """
    tokens_BT, labels_BT = batch["input_ids"], batch["labels"]
    logits_BTV = engine(tokens_BT, block_mask(batch["position_ids"]))
    logits_NV = logits_BTV[:, :-1].float().flatten(0, 1)
    labels_N = labels_BT[:, 1:].flatten()
    loss = F.cross_entropy(logits_NV, labels_N)
    hits_N = (logits_NV.detach().argmax(-1) == labels_N)[labels_N >= 0]
    return loss, {"accuracy": hits_N.float().mean()}
