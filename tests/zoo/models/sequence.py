"""Recurrent networks, attention and convolutions over sequences."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from tests.zoo.data import SAMPLES, WORDS, sequences, tokens
from tests.zoo.entry import entry
from tests.zoo.models.basics import mse

Words = tuple[Tensor]


class Recurrent(nn.Module):
    """A recurrent network, and a layer over its last output."""

    network: nn.Module

    def __init__(self, network: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.network = network
        self.last = nn.Linear(width, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return mse(self.last(self.network(x)[0][:, -1]), y)


@entry(sequences)
def lstm() -> nn.Module:
    return Recurrent(nn.LSTM(8, 8, num_layers=2, batch_first=True))


@entry(sequences)
def bidirectional_lstm() -> nn.Module:
    network = nn.LSTM(8, 6, num_layers=2, batch_first=True, bidirectional=True)
    return Recurrent(network, width=12)


@entry(sequences)
def gru() -> nn.Module:
    return Recurrent(nn.GRU(8, 8, batch_first=True))


@entry(sequences)
class GruCell(nn.Module):
    """A cell that is called at every position."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(8, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 8)
        for position in range(x.shape[1]):
            state = self.cell(x[:, position], state)
        return mse(state, y)


@entry(sequences, autocast=True)
class MultiheadAttention(nn.Module):
    """Which uses its output layer's weight without calling that layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return mse(self.last(self.attention(x, x, x)[0].mean(1)), y)


@entry(sequences, bf16=1e-1, autocast=True)
class TransformerEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return mse(self.last(self.encoder(x).mean(1)), y)


@entry(tokens)
class TransformerDecoder(nn.Module):
    """A causal decoder over a memory, with positions in a buffer."""

    positions: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 8)
        self.register_buffer("positions", torch.randn(6, 8))
        layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2)
        self.head = nn.Linear(8, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        embedded = self.words(words)
        known = embedded[:, :-1] + self.positions[:5].to(embedded.dtype)
        mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=embedded.dtype)
        hidden = self.decoder(known, embedded.flip(1).detach(), tgt_mask=mask, tgt_is_causal=True)
        return F.cross_entropy(self.head(hidden).float().flatten(0, 1), words[:, 1:].flatten())


@entry(tokens)
class Embeddings(nn.Module):
    """Words and positions, with a padding word whose embedding stays zero."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 8, padding_idx=0)
        self.positions = nn.Embedding(6, 8)
        self.head = nn.Linear(8, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        places = torch.arange(words.shape[1])
        hidden = torch.tanh(self.words(words) + self.positions(places))
        return F.cross_entropy(self.head(hidden).float().flatten(0, 1), words.roll(1, 1).flatten())


@entry(tokens)
class EmbeddingBag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(WORDS, 8, mode="mean")
        self.head = nn.Linear(8, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.words(words[:, :-1])).float(), words[:, -1])


@entry(sequences, autocast=True)
class DilatedConvolutions(nn.Module):
    """Gated causal convolutions, as in WaveNet."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(8, 16, 2, dilation=2**n) for n in range(2))
        self.last = nn.Conv1d(8, 8, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = x.mT
        for number, layer in enumerate(self.layers):
            value, gate = layer(F.pad(hidden, (2**number, 0))).chunk(2, 1)
            hidden = hidden + torch.tanh(value) * torch.sigmoid(gate)
        return mse(self.last(hidden)[..., -1], y)


def speech(generator: Generator, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Frames [4, 12, 8], labels [4, 3] without the blank, and the lengths of both."""
    frames = torch.randn(SAMPLES, 12, 8, generator=generator)
    labels = torch.randint(1, WORDS, (SAMPLES, 3), generator=generator)
    return frames, labels, torch.tensor([12, 11, 9, 8]), torch.tensor([3, 2, 3, 1])


@entry(speech)
class Ctc(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.GRU(8, 12, batch_first=True)
        self.head = nn.Linear(12, WORDS)

    def forward(self, frames: Tensor, labels: Tensor, long: Tensor, short: Tensor) -> Tensor:
        scores = self.head(self.network(frames)[0]).float().log_softmax(2)
        return F.ctc_loss(scores.transpose(0, 1), labels, long, short)


def padded(generator: Generator, number: int) -> tuple[Tensor, Tensor]:
    """Words [4, 6], and what is masked among them as labels (elsewhere -100): of other numbers."""
    (words,) = tokens(generator, number)
    lengths = torch.randint(1, 7, (SAMPLES, 1), generator=generator)
    places = torch.arange(6)
    is_masked = (places < lengths) & (places % 2 == 0)
    return words.masked_fill(is_masked, 0), words.masked_fill(~is_masked, -100)


def count_labels(batch: Any) -> int:
    """Of how many terms the loss is the mean."""
    return int((batch[1] != -100).sum())


@entry(padded, weigh=count_labels)
class MaskedLanguageModel(nn.Module):
    """The mean over all masked words of a step, however they are spread over micro-batches."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(8, WORDS)

    def forward(self, words: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(self.encoder(self.words(words))).float()
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())
