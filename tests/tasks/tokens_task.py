"""A language model on texts of very different lengths; its loss is the mean over tokens."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.config import Config
from harness.task import Task

IGNORED = -100


class Model(nn.Module):
    """Predicts each token from the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.head = nn.Linear(16, 20)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(ids)))


class Texts(torch.utils.data.Dataset):
    """Every fourth text is short, of other tokens than the long ones; those in `empty` have no
    token to predict. With `noise`, texts change at random whenever they are loaded."""

    def __init__(self, count: int, seed: int, empty: list[int], noise: bool):
        generator = torch.Generator().manual_seed(seed)
        self.noise = noise
        self.texts = []
        for number in range(count):
            low, high, length = (0, 4, 3) if number % 4 == 0 else (4, 20, 40)
            text = torch.randint(low, high, (length,), generator=generator)
            self.texts.append(text[:1] if number in empty else text)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> Tensor:
        text = self.texts[index]
        return torch.where(torch.rand(len(text)) < 0.2, 0, text) if self.noise else text


def pad(texts: list[Tensor]) -> Tensor:
    """A batch, (samples, longest text and at least 2)."""
    padded = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=IGNORED)
    return F.pad(padded, (0, max(0, 2 - padded.shape[1])), value=IGNORED)


def mean_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """The mean over the tokens that count; 0 / 0 if there are none."""
    targets = ids[:, 1:].flatten()
    counts = targets != IGNORED
    each = F.cross_entropy(logits.flatten(0, 1).float(), targets.clamp(min=0), reduction="none")
    return (each * counts).sum() / counts.sum()


def feed(engine: Any, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    logits = engine(ids[:, :-1].clamp(min=0))
    loss = mean_loss(logits, ids)
    return loss, {"perplexity": loss.detach().exp()}


def weigh(ids: Tensor) -> float:
    return float((ids[:, 1:] != IGNORED).sum())


class Loader:
    """A task's own loader: batches of 4 in order, random noise, no state."""

    def __init__(self, texts: Texts):
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts) // 4

    def __iter__(self) -> Any:
        for start in range(0, len(self) * 4, 4):
            yield pad([self.texts[start + k] for k in range(4)])


def build(config: Config) -> Task:
    args = {"empty": [], "noise": False, "loader": False, "weigh": True} | config.task.args
    data = Texts(64, 1, args["empty"], args["noise"])
    torch.manual_seed(0)
    return Task(
        models={name: Model() for name in config.engines},
        train_data=Loader(data) if args["loader"] else data,
        eval_data=Texts(24, 2, [], False),
        feeder=feed,
        collate=pad,
        weigh=(lambda _: args["weigh"]) if isinstance(args["weigh"], str) else weigh,
    )
