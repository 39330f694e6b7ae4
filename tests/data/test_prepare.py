"""`harness data prepare`: every kind of source gives the same documents."""

import json
import sys
from pathlib import Path

import pytest

from harness.cli import main
from harness.data.prepare import BATCH_DOCUMENTS, Options, prepare
from harness.data.token_files import Documents, TokenFile
from harness.errors import ConfigError

TEXTS = ["the cat sat", "", "on the mat\nand slept", "ein Käse", "x" * 50]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE with an <|endoftext|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet
    )
    made.train_from_iterator(TEXTS * 3, trainer)
    made.enable_truncation(2)  # of another use, which must not shorten documents
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    return folder


def prepared(sources: list[Path], options: Options) -> list[list[int]]:
    destination = sources[0].parent / "out" / "corpus"
    lines: list[str] = []
    prepare(sources, destination, options, lines.append)
    documents = Documents(TokenFile(destination))
    assert f"{len(documents):,} documents" in lines[0]
    return [documents[index].tolist() for index in range(len(documents))]


def write_jsonl(path: Path, name: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": 1, name: text}) + "\n" for text in TEXTS))
    return path


def write_parquet(path: Path) -> Path:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"id": list(range(len(TEXTS))), "text": TEXTS})
    parquet.write_table(table, path, row_group_size=2)
    return path


def write_saved(path: Path) -> Path:
    """As `datasets.Dataset.save_to_disk` does, in two files."""
    import pyarrow
    from pyarrow import ipc

    path.mkdir()
    files = []
    for number, texts in enumerate((TEXTS[:2], TEXTS[2:])):
        table = pyarrow.table({"text": texts})
        files.append({"filename": f"data-{number}.arrow"})
        with ipc.new_stream(str(path / files[-1]["filename"]), table.schema) as stream:
            stream.write_table(table)
    (path / "state.json").write_text(json.dumps({"_data_files": files}))
    (path / "dataset_info.json").write_text("{}")
    return path


def test_every_kind_of_source_gives_the_same_documents(tmp_path: Path, tokenizer: Path) -> None:
    from tokenizers import Tokenizer

    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / ".hidden").write_text("not this")
    (folder / "README").write_text("nor this")
    for number, text in enumerate(TEXTS):
        (folder / "sub" / f"{number}.txt").write_text(text)
    plain = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    plain.no_truncation()
    end = plain.token_to_id("<|endoftext|>")
    expected = [[*plain.encode(text).ids, end] for text in TEXTS]
    options = Options(str(tokenizer), glob="*.txt")
    for source in (
        folder,
        write_jsonl(tmp_path / "a.jsonl"),
        write_parquet(tmp_path / "a.parquet"),
        write_saved(tmp_path / "saved"),
    ):
        assert prepared([source], options) == expected, source
    assert [plain.decode(tokens) for tokens in expected] == TEXTS
    both = prepared([tmp_path / "a.jsonl", tmp_path / "a.parquet"], options)
    assert both == 2 * expected
    assert TokenFile(tmp_path / "out" / "corpus").tokens.dtype == "uint16"


def test_bytes_lines_and_ends(tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_bytes("ab\r\nä\n".encode())
    assert prepared([source], Options("bytes")) == [[*b"ab\r\n", *"ä".encode(), 10, 0]]
    lines = Options("bytes", lines=True, eos="")
    assert prepared([source], lines) == [[97, 98], [*"ä".encode()]]
    assert TokenFile(tmp_path / "out" / "corpus").tokens.dtype == "uint8"


def test_more_documents_than_a_batch(tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("".join(f"{number}\n" for number in range(2 * BATCH_DOCUMENTS + 5)))
    found = prepared([source], Options("bytes", lines=True, eos=""))
    assert found == [[*str(number).encode()] for number in range(2 * BATCH_DOCUMENTS + 5)]


def test_folders_are_followed_through_links_once_and_corpora_left_out(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "disk").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    (tmp_path / "disk" / "b.txt").write_text("b")
    write_saved(tmp_path / "disk" / "saved")
    (tmp_path / "texts" / "disk").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "back").symlink_to(tmp_path / "texts")
    for _ in range(2):
        prepare([tmp_path / "texts"], tmp_path / "texts" / "corpus", Options("bytes"), print)
        documents = Documents(TokenFile(tmp_path / "texts" / "corpus"))
        texts = [bytes(documents[index].tolist()[:-1]).decode() for index in range(len(documents))]
        assert texts == ["a", "b", *TEXTS]
    with pytest.raises(ConfigError, match="is a corpus"):
        prepare([tmp_path / "texts" / "corpus.bin"], tmp_path / "x", Options("bytes"), print)


def test_a_vocabulary_may_have_holes(tmp_path: Path) -> None:
    """As those of Hugging Face's models have, whose embedding is longer than `get_vocab_size`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<unk>": 0, "<|endoftext|>": 1, "hello": 2, "world": 70_000}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("hello world")
    lines: list[str] = []
    prepare([tmp_path / "a.txt"], tmp_path / "a", Options(str(tmp_path)), lines.append)
    corpus = TokenFile(tmp_path / "a")
    assert (corpus.slice(0, 9).tolist(), corpus.tokens.dtype) == ([2, 70_000, 1], "int32")
    assert "of a vocabulary of 70,001" in lines[0]


def test_mistakes_are_named(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"ok\n\xff\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.json").write_text("{}")
    (tmp_path / "null.jsonl").write_text('{"text": null}\n')
    (tmp_path / "half.jsonl").write_text('{"text": "a"}\n{"text": "\\ud800"}\n')
    (tmp_path / "dangling").mkdir()
    (tmp_path / "dangling" / "a.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "dataset_dict.json").write_text("{}")
    write_jsonl(tmp_path / "body.jsonl", "body")
    write_parquet(tmp_path / "a.parquet")
    saved = write_saved(tmp_path / "saved")
    chosen = {"_data_files": [], "_indices_data_files": [{"filename": "x"}]}
    (saved / "state.json").write_text(json.dumps(chosen))
    plain = Options("bytes")
    cases: list[tuple[str, Options, str]] = [
        ("bad.txt", plain, "bad.txt is not UTF-8"),
        ("bad.txt", Options("bytes", lines=True), "bad.txt:2 is not UTF-8"),
        ("bad.jsonl", plain, "bad.jsonl:2 is not JSON"),
        ("list.jsonl", plain, "list.jsonl:1: no field 'text'; found list"),
        ("body.jsonl", plain, r"body.jsonl:1: no field 'text'; found \['body', 'id'\]"),
        ("null.jsonl", plain, "null.jsonl:1: 'text' is NoneType, expected text"),
        ("half.jsonl", plain, "half.jsonl:2: 'text' is not Unicode text"),
        ("splits", plain, "splits holds several data sets"),
        ("bad.parquet", plain, "bad.parquet cannot be read"),
        ("a.parquet", Options("bytes", field="x"), r"no column 'x'; found \['id', 'text'\]"),
        ("a.parquet", Options("bytes", field="id"), "row 0: 'id' is int, expected text"),
        ("saved", plain, "flatten_indices"),
        ("none", plain, "none does not exist"),
        ("empty", plain, "empty has no files"),
        ("empty.jsonl", plain, "no texts in"),
        ("bad.txt", Options(str(tmp_path / "none.json")), "none.json does not exist"),
        ("bad.txt", Options(str(tmp_path / "broken.json")), "--tokenizer: .*broken.json"),
        ("bad.txt", Options(str(tokenizer), eos="<e>"), "has no token '<e>'"),
    ]
    for name, options, message in cases:
        with pytest.raises(ConfigError, match=message):
            prepare([tmp_path / name], tmp_path / "out" / "corpus", options, print)
    with pytest.raises(FileNotFoundError, match="dangling"):
        prepare([tmp_path / "dangling"], tmp_path / "out" / "corpus", plain, print)
    with pytest.raises(ConfigError, match=r"^\. is a folder"):
        prepare([tmp_path / "a.parquet"], Path(), plain, print)
    left = [path.name for path in (tmp_path / "out").iterdir()]
    assert not left, "nothing is half-written"


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(tmp_path / "a.jsonl")
    words = ["harness", "data", "prepare", str(tmp_path / "a.jsonl"), str(tmp_path / "corpus")]
    monkeypatch.setattr(sys, "argv", [*words, "--tokenizer", "bytes"])
    main()
    assert "5 documents, 95 tokens (uint8) of a vocabulary of 256" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*words, "--tokenizer", "none"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err.startswith("error: --tokenizer: none does not exist")
