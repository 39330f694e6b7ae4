"""Rows, tokenized: texts, prompts with completions, chats.

A sample is `{"input_ids", "labels"}`, int64 [T]; of a text from another one the labels have a
length of their own. Labels of -100 do not count.
"""

import logging
import re
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, default_collate

from harness.data.packing import IGNORED, Packed
from harness.errors import ConfigError
from harness.huggingface.library import transformers
from harness.huggingface.models import Kind, padding_token
from harness.huggingface.rows import Row

log = logging.getLogger(__name__)

Sample = dict[str, Tensor]
MARKS_REPLIES = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""In a chat template: what follows is the model's."""


class Samples(Dataset[Sample]):
    """Rows, tokenized when they are asked for, and cut after `length` tokens.

    A row is {"messages": [{"role", "content"}, ...]}, of which the assistant's are learned; or
    {"prompt", "completion"}, of which the completion is; or {field: text}.
    """

    def __init__(self, rows: Sequence[Row], tokenizer: Any, kind: Kind, length: int, field: str):
        self.rows, self.tokenizer, self.kind = rows, tokenizer, kind
        self.length, self.field = length, field
        self._has_warned = False

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        tokens, labels = self.tokens_of(index)
        if max(len(tokens), len(labels)) > self.length and not self._has_warned:
            self._has_warned = True
            log.warning("row %d is cut after %d tokens, as others may be", index, self.length)
        return {
            "input_ids": torch.tensor(tokens[: self.length], dtype=torch.int64),
            "labels": torch.tensor(labels[: self.length], dtype=torch.int64),
        }

    def tokens_of(self, index: int) -> tuple[list[int], list[int]]:
        """A row's tokens and labels, of any length. Raises ConfigError for another form."""
        row = self.rows[index]
        try:
            if self.kind == "seq2seq":
                return self._source_and_target(row)
            if isinstance(row.get("messages"), list) and self.kind == "causal":
                return chat_tokens(self.tokenizer, row["messages"])
            if "completion" in row and self.kind == "causal":
                return self._completed(row)
            tokens = self.tokenizer(_text(row, self.field))["input_ids"]
            return self._ended(tokens), self._ended(tokens)
        except ConfigError as error:
            raise ConfigError(f"row {index}: {error}") from None

    def _ended(self, tokens: list[int]) -> list[int]:
        """The tokens of a text and its end, which a causal model learns too."""
        end = self.tokenizer.eos_token_id
        if self.kind != "causal" or end is None or tokens[-1:] == [end]:
            return tokens
        return [*tokens, end]

    def _completed(self, row: Row) -> tuple[list[int], list[int]]:
        prompt = self.tokenizer(_text(row, "prompt"))["input_ids"]
        if prompt[-1:] == [self.tokenizer.eos_token_id]:
            prompt = prompt[:-1]
        completion = self.tokenizer(_text(row, "completion"), add_special_tokens=False)
        rest = self._ended(completion["input_ids"])
        return prompt + rest, [IGNORED] * len(prompt) + rest

    def _source_and_target(self, row: Row) -> tuple[list[int], list[int]]:
        source = self.tokenizer(_text(row, "prompt"))["input_ids"]
        target = self.tokenizer(text_target=_text(row, "completion"))["input_ids"]
        return source, target


def _text(row: Row, field: str) -> str:
    text = row.get(field)
    if not isinstance(text, str):
        raise ConfigError(f"no text in field {field!r}; found {sorted(row)}")
    return text


def chat_tokens(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]]
) -> tuple[list[int], list[int]]:
    """The tokens of a chat, and its labels: the assistant's messages, and what ends each.

    By the template's `{% generation %}`, if it has that; otherwise by rendering the chat up to each
    of these messages. Raises ConfigError for a tokenizer without a template, and for a template
    that renders the beginning of a chat in another way than the chat.
    """
    if not tokenizer.chat_template:
        raise ConfigError("the row is a chat, but the tokenizer has no chat_template")
    if MARKS_REPLIES.search(str(tokenizer.chat_template)):
        encoded = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        tokens, mask = encoded["input_ids"], encoded["assistant_masks"]
    else:
        tokens, mask = _mask_by_rendering(tokenizer, messages)
    return tokens, [t if m else IGNORED for t, m in zip(tokens, mask, strict=True)]


def _mask_by_rendering(tokenizer: Any, messages: Sequence[Any]) -> tuple[list[int], list[bool]]:
    def render(count: int, **options: Any) -> str:
        return tokenizer.apply_chat_template(messages[:count], tokenize=False, **options)

    whole = render(len(messages))
    spans: list[tuple[int, int]] = []
    for number, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        before, through = render(number, add_generation_prompt=True), render(number + 1)
        if not (whole.startswith(through) and through.startswith(before)):
            raise ConfigError(
                f"the chat template renders the first {number + 1} messages in another way when "
                "more follow: mark the assistant's text in it by {% generation %}"
            )
        spans.append((len(before), len(through)))
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    mask = [
        any(first < end and start < last for first, last in spans)
        for start, end in encoded["offset_mapping"]
    ]
    return encoded["input_ids"], mask


class TokenizedSamples:
    """All samples, tokenized at once: the documents that `Packed` packs, with their labels."""

    def __init__(self, samples: Samples):
        self._tokens, self._labels, self._ends = array("i"), array("i"), array("q", [0])
        for index in range(len(samples)):
            tokens, labels = samples.tokens_of(index)
            self._tokens.extend(tokens)
            self._labels.extend(labels)
            self._ends.append(len(self._tokens))
        ends = torch.frombuffer(self._ends, dtype=torch.int64)
        self.lengths = ends.diff().tolist()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        part = slice(self._ends[index], self._ends[index + 1])
        return torch.tensor(self._tokens[part]), torch.tensor(self._labels[part])


class Collate:
    """Samples of a kind into a batch, as its models take them."""

    def __init__(self, tokenizer: Any, kind: Kind, mask_share: float):
        """`mask_share`: of tokens that a masked model has to predict."""
        self.pad = padding_token(tokenizer)
        self.kind = kind
        self._mask = None
        if kind == "masked":
            if tokenizer.mask_token is None:
                raise ConfigError("the tokenizer has no mask_token, which a masked model needs")
            self._mask = transformers().DataCollatorForLanguageModeling(
                tokenizer, mlm_probability=mask_share
            )

    def __call__(self, samples: list[Sample]) -> Sample:
        if "position_ids" in samples[0]:  # windows of packed documents
            return default_collate(samples)
        batch = {
            name: pad_sequence([s[name] for s in samples], True, padding)
            for name, padding in (("input_ids", self.pad), ("labels", IGNORED))
        }
        sizes = torch.tensor([len(sample["input_ids"]) for sample in samples])
        places = torch.arange(batch["input_ids"].shape[1])
        batch["attention_mask"] = (places < sizes[:, None]).long()
        if self.kind == "causal":
            batch["labels"][:, 0] = IGNORED  # predicted from nothing
        if self._mask is not None:
            special = (batch["labels"] == IGNORED) | self._is_special(batch["input_ids"])
            batch["input_ids"], batch["labels"] = self._mask.torch_mask_tokens(
                batch["input_ids"], special_tokens_mask=special
            )
        return batch

    def _is_special(self, tokens: Tensor) -> Tensor:
        assert self._mask is not None
        return torch.isin(tokens, torch.tensor(self._mask.tokenizer.all_special_ids))


def packed(samples: Samples, method: Any) -> Packed:
    """The samples in windows of their length, each trained as if it were alone."""
    pad = padding_token(samples.tokenizer)
    return Packed(TokenizedSamples(samples), samples.length, method=method, pad=pad)
