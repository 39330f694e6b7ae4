"""Documents packed into windows of one length, trained as if each were alone; usable without
harness.

A window is `input_ids`, `labels` and `position_ids`, as models of Hugging Face take them: positions
restart with every document, which is all that tells documents apart. `labels` are the tokens,
except that the first of a document and padding are -100: they are predicted from nothing.

    windows = Packed(Documents(TokenFile("corpus")), length=2048)
    Task(train_data=windows, weigh=count_labels, ...)

Attention must not cross documents. Hugging Face's models see to it from `position_ids`, if they get
no `attention_mask` and `use_cache=False`: with a cache, which is their default, attention crosses
documents without a word (transformers 5.24). `block_mask` is for torch's
scaled_dot_product_attention, and `sequence_bounds` for torch.nn.attention.varlen and
flash-attention.
"""

from array import array
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

IGNORED = -100
"""The label of what is not predicted: `ignore_index` of torch's cross_entropy."""

Method = Literal["first_fit", "greedy", "concatenate"]
Piece = tuple[int, int, int]
"""`(document, start, end)` of tokens in a window."""


class Packed(Dataset[dict[str, Tensor]]):
    """Windows of documents: `{"input_ids", "labels", "position_ids"}`, each int64 [length].

    `documents` is a map-style dataset of tokens, int64 [their number], or of `(tokens, labels)`,
    where not all are to be predicted; with `lengths`. A document
    that is longer than a window is cut into pieces, each packed like a document of its own; every
    token is in one window. What is left of a window is padding, a document without labels.

    `method`: "first_fit" puts a piece into the first of `lookahead` open windows that has room, and
    closes the fullest if none has; "greedy" has one open window; "concatenate" fills every window
    and cuts the documents where it ends. It takes about 24 bytes a piece.

    Raises ValueError if there are no tokens.
    """

    def __init__(
        self,
        documents: Any,
        length: int,
        *,
        method: Method = "first_fit",
        lookahead: int = 64,
        pad: int = 0,
    ):
        if length < 2:
            raise ValueError(f"length = {length}: expected an integer >= 2")
        self.documents, self.length, self.pad = documents, length, pad
        self._pieces, self._ends = array("q"), array("q")
        tokens = 0
        for window in pack(documents.lengths, length, method, lookahead):
            for piece in window:
                self._pieces.extend(piece)
                tokens += piece[2] - piece[1]
            self._ends.append(len(self._pieces))
        if not tokens:
            raise ValueError("the documents have no tokens")
        self.efficiency = tokens / (len(self) * length)
        """The share of the windows that is not padding."""

    def __len__(self) -> int:
        return len(self._ends)

    def pieces(self, index: int) -> list[Piece]:
        """The parts of documents in a window, in order."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        numbers = iter(self._pieces[self._ends[index - 1] if index else 0 : self._ends[index]])
        return list(zip(numbers, numbers, numbers, strict=True))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.full((self.length,), self.pad)
        labels = torch.full((self.length,), IGNORED)
        positions = torch.empty(self.length, dtype=torch.int64)
        at = 0
        for document, start, end in self.pieces(index):
            whole = self.documents[document]
            own_labels = None
            if isinstance(whole, tuple):
                whole, own_labels = whole
            part = whole[start:end]
            tokens[at : at + len(part)] = part
            learned = part if own_labels is None else own_labels[start:end]
            labels[at + 1 : at + len(part)] = learned[1:]
            positions[at : at + len(part)] = torch.arange(len(part))
            at += len(part)
        positions[at:] = torch.arange(self.length - at)
        return {"input_ids": tokens, "labels": labels, "position_ids": positions}


def pack(
    lengths: Iterable[int], length: int, method: Method = "first_fit", lookahead: int = 64
) -> Iterator[list[Piece]]:
    """The windows: pieces of documents, at most `length` tokens together. See `Packed`."""
    if method == "concatenate":
        return _concatenated(lengths, length)
    if method not in ("first_fit", "greedy"):
        raise ValueError(f"method = {method!r}: expected 'first_fit', 'greedy' or 'concatenate'")
    return _first_fit(lengths, length, lookahead if method == "first_fit" else 1)


def _first_fit(lengths: Iterable[int], length: int, lookahead: int) -> Iterator[list[Piece]]:
    windows: list[list[Piece]] = []  # the open ones
    rooms: list[int] = []
    for document, total in enumerate(lengths):
        for start in range(0, int(total), length):
            end = min(start + length, int(total))
            size = end - start
            place = next((place for place, room in enumerate(rooms) if room >= size), None)
            if place is None:
                if len(windows) == lookahead:
                    fullest = rooms.index(min(rooms))
                    rooms.pop(fullest)
                    yield windows.pop(fullest)
                place = len(windows)
                windows.append([])
                rooms.append(length)
            windows[place].append((document, start, end))
            rooms[place] -= size
            if not rooms[place]:
                rooms.pop(place)
                yield windows.pop(place)
    yield from windows


def _concatenated(lengths: Iterable[int], length: int) -> Iterator[list[Piece]]:
    window: list[Piece] = []
    room = length
    for document, total in enumerate(lengths):
        start = 0
        while start < total:
            end = min(start + room, int(total))
            window.append((document, start, end))
            room -= end - start
            start = end
            if not room:
                yield window
                window, room = [], length
    if window:
        yield window


def count_labels(batch: Mapping[str, Tensor]) -> int:
    """How many labels count: `Task.weigh` of packed windows."""
    return int((batch["labels"] != IGNORED).sum())


def block_mask(position_ids: Tensor) -> Tensor:
    """Which position may attend to which: itself and those before it in the same document.

    `position_ids`: int64 [B, T]. Returns bool [B, 1, T, T], the `attn_mask` of torch's
    scaled_dot_product_attention.
    """
    documents = (position_ids == 0).cumsum(-1)
    is_same = documents[:, :, None] == documents[:, None, :]
    return is_same.tril().unsqueeze(1)


def sequence_bounds(position_ids: Tensor) -> tuple[Tensor, int]:
    """`(cu_seqlens, max_seqlen)` of the documents in a batch, [B, T] flattened to [B * T].

    `cu_seqlens`: int32 [documents + 1], the places where they begin, and the end. Call it on the
    CPU, like in `Task.collate`: its shape depends on the values, which a device would wait for.
    """
    flat = position_ids.flatten()
    starts = (flat == 0).nonzero().flatten()
    bounds = torch.cat([starts, starts.new_tensor([len(flat)])]).to(torch.int32)
    return bounds, int(bounds.diff().max())
