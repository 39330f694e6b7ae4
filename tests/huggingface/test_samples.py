"""Rows as samples: which tokens are learned, and how batches are made (extra: hf)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.errors import ConfigError
from harness.huggingface.rows import read_rows
from harness.huggingface.samples import Collate, Samples, chat_tokens, packed
from tests.support import hf_folders

pytest.importorskip("transformers", reason="needs the extra: hf")

CHAT = [
    {"role": "user", "content": "the quick"},
    {"role": "assistant", "content": "brown fox"},
    {"role": "user", "content": "jumps"},
    {"role": "assistant", "content": "over"},
]
MARKED = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}</s>{% endgeneration %}"
    "{% else %}{{ message['content'] }}</s>{% endif %}{% endfor %}"
)


def learned(tokenizer: Any, labels: Any) -> str:
    return tokenizer.decode([label for label in labels if label >= 0])


@pytest.mark.parametrize("template", [hf_folders.CHAT_TEMPLATE, MARKED], ids=["plain", "marked"])
def test_of_a_chat_the_replies_and_their_ends_are_learned(template: str) -> None:
    tokenizer = hf_folders.tokenizer()
    tokenizer.chat_template = template
    tokens, labels = chat_tokens(tokenizer, CHAT)
    assert tokens == tokenizer.apply_chat_template(CHAT)["input_ids"]
    assert learned(tokenizer, labels) == "brown fox</s>over</s>"
    assert all(label in (-100, token) for token, label in zip(tokens, labels, strict=True))


def test_a_template_that_renders_earlier_replies_in_another_way_is_refused() -> None:
    tokenizer = hf_folders.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% if loop.last %}!{% endif %}{% endfor %}"
    )
    with pytest.raises(ConfigError, match=r"first 2 messages .* mark .* by {% generation %}"):
        chat_tokens(tokenizer, CHAT)
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="the tokenizer has no chat_template"):
        chat_tokens(tokenizer, CHAT)


def samples_of(rows: list[dict[str, Any]], kind: Any = "causal", length: int = 64) -> Samples:
    return Samples(rows, hf_folders.tokenizer(), kind, length, "text")


def test_of_a_completion_the_prompt_is_not_learned() -> None:
    samples = samples_of([{"prompt": "the quick", "completion": " brown fox"}])
    sample = samples[0]
    assert samples.tokenizer.decode(sample["input_ids"]) == "the quick brown fox</s>"
    assert learned(samples.tokenizer, sample["labels"].tolist()) == " brown fox</s>"


def test_a_batch_is_padded_and_its_first_token_is_predicted_from_nothing() -> None:
    samples = samples_of([{"text": "the quick brown fox"}, {"text": "the"}])
    batch = Collate(samples.tokenizer, "causal", 0.15)([samples[0], samples[1]])
    longer, shorter = (len(sample["input_ids"]) for sample in samples)
    padding = longer - shorter
    assert batch["input_ids"][1].tolist() == samples[1]["input_ids"].tolist() + [0] * padding
    assert batch["attention_mask"].sum(1).tolist() == [longer, shorter]
    assert batch["labels"][1].tolist() == [-100, 2, *[-100] * padding]
    assert batch["labels"][0].tolist() == [-100, *samples[0]["input_ids"].tolist()[1:]]


def test_without_a_token_for_padding_the_end_of_texts_is_learned_all_the_same() -> None:
    tokenizer = hf_folders.tokenizer(pads=False)
    samples = Samples([{"text": "the wit"}, {"text": "the"}], tokenizer, "causal", 8, "text")
    batch = Collate(tokenizer, "causal", 0.15)([samples[0], samples[1]])
    assert batch["input_ids"][1].tolist()[1:3] == [2, 2], "the end, and padding"
    assert batch["labels"][1].tolist()[1:3] == [2, -100]
    assert tokenizer.pad_token is None, "it is exported as it was"


def test_masked_tokens_are_some_of_the_text() -> None:
    samples = samples_of([{"text": text} for text in hf_folders.TEXTS], "masked")
    torch.manual_seed(0)
    batch = Collate(samples.tokenizer, "masked", 0.5)([samples[n] for n in range(len(samples))])
    chosen = batch["labels"] >= 0
    assert 0.3 < chosen[batch["attention_mask"] == 1].float().mean() < 0.7
    assert not chosen[batch["attention_mask"] == 0].any()
    assert (batch["input_ids"][chosen] == samples.tokenizer.mask_token_id).float().mean() > 0.6
    tokenizer = hf_folders.tokenizer()
    tokenizer.mask_token = None
    with pytest.raises(ConfigError, match="has no mask_token"):
        Collate(tokenizer, "masked", 0.15)


def test_packed_chats_keep_their_labels() -> None:
    samples = samples_of([{"messages": CHAT}] * 3, length=64)
    windows = packed(samples, "concatenate")
    tokens, labels = chat_tokens(samples.tokenizer, CHAT)
    found = torch.cat([windows[n]["labels"] for n in range(len(windows))])
    assert learned(samples.tokenizer, found.tolist()).count("over</s>") == 3
    assert windows[0]["input_ids"][: len(tokens)].tolist() == tokens
    assert windows[0]["labels"][: len(labels)].tolist() == labels


def test_rows_of_files(tmp_path: Path) -> None:
    rows = hf_folders.write_rows(tmp_path / "rows.jsonl", "messages")
    assert read_rows(rows)[0]["messages"][0]["content"] == "the quick brown"
    (tmp_path / "a.txt").write_text("one\ntwo")
    assert read_rows(tmp_path / "a.txt") == [{"text": "one\ntwo"}]
    assert len(read_rows(tmp_path)) == 9
    for text, message in {"{": "rows.jsonl:1 is not JSON", "[1]": "a list, expected an"}.items():
        rows.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_rows(rows)
    rows.write_text("")
    with pytest.raises(ConfigError, match="has no rows"):
        read_rows(rows)


def test_rows_of_a_data_set_that_was_saved_on_disk(tmp_path: Path) -> None:
    """As `datasets.Dataset.save_to_disk` writes one: Arrow streams, and which they are."""
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra: data")
    table = pyarrow.Table.from_pylist([{"messages": CHAT}, {"messages": CHAT[:2]}])
    folder = tmp_path / "saved"
    folder.mkdir()
    for number in range(2):
        file = str(folder / f"data-{number}.arrow")
        with pyarrow.OSFile(file, "wb") as out, pyarrow.ipc.new_stream(out, table.schema) as stream:
            stream.write_table(table)
    parts = [{"filename": f"data-{number}.arrow"} for number in range(2)]
    (folder / "state.json").write_text(json.dumps({"_data_files": parts}))
    (folder / "dataset_info.json").write_text("{}")
    found = read_rows(folder)
    assert len(found) == 4
    assert found[3]["messages"] == CHAT[:2]
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert read_rows(tmp_path / "rows.parquet")[0]["messages"] == CHAT


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("causal", {"other": "x"}, r"row 0: no text in field 'text'; found \['other'\]"),
        ("causal", {"prompt": 3, "completion": "x"}, "row 0: no text in field 'prompt'"),
        ("seq2seq", {"text": "x"}, "row 0: no text in field 'prompt'"),
        ("masked", {"messages": CHAT}, "row 0: no text in field 'text'"),
    ],
)
def test_a_row_of_another_form_is_an_error(kind: Any, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        samples_of([row], kind)[0]
