"""Corpora of tokens: what is written is read, as windows and as documents."""

import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from harness.data.token_files import Documents, TokenFile, TokenWindows, TokenWriter

TEXTS = [[1, 2, 3], [4], [], [5, 6, 7, 8, 9], [10, 11]]
JOINED = [token for text in TEXTS for token in text]


def written(path: Path, dtype: str = "u2") -> TokenFile:
    with TokenWriter(path, dtype) as writer:
        writer.write(TEXTS[:2])
        writer.write(TEXTS[2:])
    assert writer.tokens == 11
    return TokenFile(path)


@pytest.mark.parametrize("dtype", ["u1", "u2", "i4"])
@pytest.mark.parametrize("name", ["a", "a.bin", "a.idx", "v1.5"])
def test_documents_return_as_written(tmp_path: Path, dtype: str, name: str) -> None:
    corpus = written(tmp_path / name, dtype)
    documents = Documents(corpus)
    assert [documents[i].tolist() for i in range(len(documents))] == TEXTS
    assert documents.lengths.tolist() == [3, 1, 0, 5, 2]
    assert documents[0].dtype == torch.int64
    assert corpus.tokens.dtype == np.dtype(dtype)
    names = sorted(path.name for path in tmp_path.iterdir())
    stem = name.removesuffix(".bin").removesuffix(".idx")
    assert names == [f"{stem}.bin", f"{stem}.idx"], "no temporary files"


def test_an_index_is_megatrons(tmp_path: Path) -> None:
    """Byte for byte as `_IndexWriter` of megatron/core/datasets/indexed_dataset.py writes it."""
    written(tmp_path / "a")
    expected = b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + b"\x08"
    expected += (5).to_bytes(8, "little") + (6).to_bytes(8, "little")
    expected += np.array([3, 1, 0, 5, 2], "<i4").tobytes()
    expected += np.array([0, 6, 8, 8, 18], "<i8").tobytes()
    expected += np.arange(6, dtype="<i8").tobytes()
    assert (tmp_path / "a.idx").read_bytes() == expected


def test_a_document_of_several_sequences(tmp_path: Path) -> None:
    """Megatron's documents may be split, as into sentences."""
    written(tmp_path / "a")
    content = bytearray((tmp_path / "a.idx").read_bytes())
    content[26:34] = (3).to_bytes(8, "little")
    content[34 + 5 * 12 :] = np.array([0, 2, 5], "<i8").tobytes()
    (tmp_path / "a.idx").write_bytes(content)
    documents = Documents(TokenFile(tmp_path / "a"))
    assert [documents[i].tolist() for i in range(2)] == [[1, 2, 3, 4], JOINED[4:]]


def test_documents_without_a_sequence(tmp_path: Path) -> None:
    """Megatron's may be empty, also the first."""
    written(tmp_path / "a")
    content = (tmp_path / "a.idx").read_bytes()
    bounds = [0, 0, 2, 2, 5, 5]
    (tmp_path / "a.idx").write_bytes(content[: 34 + 5 * 12] + np.array(bounds, "<i8").tobytes())
    corpus = TokenFile(tmp_path / "a")
    documents = Documents(corpus)
    found = [documents[i].tolist() for i in range(len(documents))]
    assert found == [[], [1, 2, 3, 4], [], JOINED[4:], []]
    assert documents.lengths.tolist() == [len(tokens) for tokens in found]
    assert corpus.ends.tolist() == [0, 4, 4, 11, 11]


def test_an_index_is_not_held_in_memory(tmp_path: Path) -> None:
    count = 50_000
    with TokenWriter(tmp_path / "a", "u1") as writer:
        writer.write([[0]] * count)
    tracemalloc.start()
    documents = Documents(TokenFile(tmp_path / "a"))
    assert len(documents) == count and documents[count - 1].tolist() == [0]
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 2 * count


@pytest.mark.parametrize("length", [1, 2, 3, 10])
def test_windows_predict_each_token_once(tmp_path: Path, length: int) -> None:
    windows = TokenWindows(written(tmp_path / "a"), length)
    assert len(windows) == 10 // length
    for index, window in enumerate(DataLoader(windows, batch_size=None)):
        assert window.tolist() == JOINED[index * length : (index + 1) * length + 1]
    with pytest.raises(IndexError):
        windows[len(windows)]


def test_bare_files(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array(JOINED, np.uint32))
    np.array(JOINED, np.uint16).tofile(tmp_path / "b.bin")
    np.array(JOINED, np.int64).tofile(tmp_path / "c.bin")
    for corpus in (
        TokenFile(tmp_path / "a.npy"),
        TokenFile(tmp_path / "b.bin"),
        TokenFile(tmp_path / "c.bin", dtype="int64"),
    ):
        assert corpus.slice(0, 99).tolist() == JOINED
        assert corpus.ends.tolist() == [11]
    corpus = TokenFile(tmp_path / "b.bin", separator=4)
    assert [d.tolist() for d in DataLoader(Documents(corpus), batch_size=None)] == [
        JOINED[:4],
        JOINED[4:],
    ]


def test_what_is_not_a_corpus_is_named(tmp_path: Path) -> None:
    written(tmp_path / "a")
    index = (tmp_path / "a.idx").read_bytes()
    np.save(tmp_path / "square.npy", np.zeros((2, 2), np.int32))
    np.save(tmp_path / "floats.npy", np.zeros(2))
    (tmp_path / "odd.bin").write_bytes(b"abc")
    (tmp_path / "text.npy").write_bytes(b"text")
    cases = {
        "text.npy": "text.npy is not an array of numpy",
        "square.npy": r"square.npy: found int32 \[2, 2\]",
        "floats.npy": "floats.npy: found float64",
        "odd.bin": "3 bytes are not a multiple of 2",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message):
            TokenFile(tmp_path / name)
    for name in ("none.bin", "none", "none.txt"):
        with pytest.raises(FileNotFoundError, match="no such corpus"):
            TokenFile(tmp_path / name)
    changes = {
        "is not an index": b"x" + index[1:],
        "version 1, dtype 7": index[:17] + b"\x07" + index[18:],
        "too few": index[:-60],
        "one after another": index[:34] + b"\x09" + index[35:],
        "not rows of its 5 sequences": index[:-8] + b"\x63" + index[-7:],
    }
    for message, content in changes.items():
        (tmp_path / "a.idx").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            TokenFile(tmp_path / "a")
    with pytest.raises(ValueError, match="fewer than a window"):
        TokenWindows(short(tmp_path), 9)


def short(tmp_path: Path) -> TokenFile:
    np.arange(9, dtype=np.uint16).tofile(tmp_path / "short.bin")
    return TokenFile(tmp_path / "short.bin")


def test_a_process_that_is_started_maps_the_file_itself(tmp_path: Path) -> None:
    np.arange(100_000, dtype=np.uint16).tofile(tmp_path / "a.bin")
    windows = TokenWindows(TokenFile(tmp_path / "a.bin", separator=7), 10)
    pickled = pickle.dumps(windows)
    assert len(pickled) < 1000
    assert pickle.loads(pickled)[3].tolist() == list(range(30, 41))


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    written(tmp_path / "a")
    with pytest.raises(ValueError, match="not in 0 to 255"), TokenWriter(tmp_path / "a", "u1") as w:
        w.write([[1], [256]])
    assert TokenFile(tmp_path / "a").slice(0, 99).tolist() == JOINED
    assert len(list(tmp_path.iterdir())) == 2


def test_two_at_once_and_one_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / ".a.bin.tmp").write_bytes(b"left by one that was killed")
    (tmp_path / ".a.idx.tmp").write_bytes(b"left by one that was killed")
    with TokenWriter(tmp_path / "a", "u2") as writer:
        writer.write(TEXTS)
        with pytest.raises(BlockingIOError, match="another process is writing it"):
            TokenWriter(tmp_path / "a.bin", "u1")
    assert TokenFile(tmp_path / "a").slice(0, 99).tolist() == JOINED
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_a_document_that_the_format_cannot_hold_is_refused_at_once(tmp_path: Path) -> None:
    message = "2147483648 tokens: the format holds"
    with pytest.raises(ValueError, match=message), TokenWriter(tmp_path / "a", "u2") as writer:
        writer.write([range(2**31)])


def test_an_empty_corpus(tmp_path: Path) -> None:
    with TokenWriter(tmp_path / "a", "u2"):
        pass
    corpus = TokenFile(tmp_path / "a")
    assert len(corpus) == len(Documents(corpus)) == 0
