"""A tagger of token sequences of very different lengths, evaluated in the way that an arg names."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from harness import distributed
from harness.config import Config
from harness.task import Task

PAD = -100
CLASSES = 3


class Texts(Dataset):
    """Texts of 2 or 17 tokens, each with its class; those of the indices in `silent` have none."""

    def __init__(self, number: int, seed: int, silent: tuple[int, ...] = ()):
        generator = torch.Generator().manual_seed(seed)
        self.texts = [
            torch.randint(0, 12, (2 if n % 4 == 0 else 17,), generator=generator)
            for n in range(number)
        ]
        self.silent = silent

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        ids = self.texts[index]
        classes = torch.full_like(ids, PAD) if index in self.silent else ids % CLASSES
        return ids, classes


class Share(IterableDataset):
    """This rank's samples, unevenly: rank 0 has none, if it is not alone."""

    def __init__(self, texts: Texts):
        self.texts = texts

    def __iter__(self) -> Iterator[Any]:
        rank, world = distributed.global_rank(), distributed.world_size()
        own = range(len(self.texts))
        if world > 1:
            own = [n for n in own if 1 + min(n % world, world - 2) == rank]
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        for index in own[first::step]:
            yield self.texts[index]


class Broken(Texts):
    """Texts of which the fourth cannot be read."""

    def __getitem__(self, index: int) -> Any:
        if index == 3:
            raise ValueError(f"corrupt sample {index}")
        return super().__getitem__(index)


def pad(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    ids, classes = zip(*samples, strict=True)
    padded = nn.utils.rnn.pad_sequence(list(ids), batch_first=True)
    return padded, nn.utils.rnn.pad_sequence(list(classes), batch_first=True, padding_value=PAD)


def tagger(dropout: float = 0.0) -> nn.Module:
    hidden = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(dropout))
    return nn.Sequential(nn.Embedding(12, 8), *hidden, nn.Linear(8, CLASSES))


def feed(engine: Any, batch: Any) -> Any:
    ids, classes = batch
    logits = engine(ids).flatten(0, 1)
    return F.cross_entropy(logits.float(), classes.flatten(), ignore_index=PAD), {}


def count_errors(engine: Any, batch: Any) -> Any:
    """Sums for perplexity, and a confusion matrix."""
    ids, classes = batch
    logits, classes = engine(ids).flatten(0, 1).float(), classes.flatten()
    known = classes != PAD
    pairs = classes[known] * CLASSES + logits.argmax(1)[known]
    return {
        "nll": F.cross_entropy(logits, classes, ignore_index=PAD, reduction="sum"),
        "tokens": int(known.sum()),
        "confusion": torch.bincount(pairs, minlength=CLASSES**2).view(CLASSES, CLASSES),
    }


def perplexity_and_f1(sums: dict[str, Tensor]) -> dict[str, Any]:
    matrix = sums["confusion"]
    f1 = 2 * matrix.diag() / (matrix.sum(0) + matrix.sum(1)).clamp(min=1)
    return {"perplexity": torch.exp(sums["nll"] / sums["tokens"]), "f1": f1.mean()}


def terms(batch: Any) -> Tensor:
    """How many labels a batch has."""
    return (batch[1] != PAD).sum()


def build(config: Config) -> Task:
    args = {"kind": "map", "samples": 22, "silent": (), "dropout": 0.0}
    args |= {"weigh": False, "sums": False} | config.task.args
    texts = Texts(args["samples"], 2, tuple(args["silent"]))
    held_out: Any = texts
    match args["kind"]:
        case "samples":
            held_out = Share(texts)
        case "batches":
            held_out = DataLoader(Share(texts), batch_size=3, collate_fn=pad)
        case "sets":
            held_out = {"dev": texts, "test": Share(Texts(9, 5))}
        case "broken":
            held_out = Broken(args["samples"], 2)
    more: dict[str, Any] = {"weigh": terms} if args["weigh"] else {}
    if args["sums"]:
        more |= {"evaluate": count_errors, "summarize": perplexity_and_f1}
    return Task(
        models={name: tagger(args["dropout"]) for name in config.engines},
        train_data=Texts(32, 1),
        eval_data=held_out,
        feeder=feed,
        collate=pad,
        **more,
    )
