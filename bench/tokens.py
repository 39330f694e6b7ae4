"""What a corpus of tokens costs, as ratios to what a user would write instead.

    python -m bench.tokens [--mb 64] [--length 2048] [--rounds 7]

- reading: tokens/s of a rank's loader over `TokenWindows`, of a plain loop over numpy's memmap (as
  in nanoGPT), and, if they are installed, of `datasets` and of MosaicML's `streaming` with the same
  windows as rows, uncompressed and shuffled;
- preparing: MB/s of `harness data prepare`, and of the package `tokenizers` alone, which encodes
  the same texts and keeps nothing;
- packing: the share of the windows that is not padding.

The texts are Python's own sources, again and again; the tokenizer is a BPE trained on them. Runs
alternate, and each ratio is the median over pairs of them. Seconds are those of all cores that
this process has used, so that other processes matter little.
"""

import argparse
import functools
import importlib
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.rows import Row, tell
from harness.config.sections import DataConfig
from harness.data.packing import Packed
from harness.data.prepare import Options, batches_of, files_of, prepare, texts_of
from harness.data.token_files import TokenFile, TokenWindows
from harness.data.train_batches import train_batches

SIZE = 8
"""Windows in a batch."""
BATCHES = 200
"""In a run."""


def harness_batches(corpus: TokenFile, length: int) -> Iterator[torch.Tensor]:
    config = DataConfig(micro_batch_size=SIZE)
    batches = train_batches(TokenWindows(corpus, length), config, torch.stack, 1, 0, 1)
    while True:
        yield next(batches)


def numpy_batches(corpus: TokenFile, length: int) -> Iterator[torch.Tensor]:
    tokens = corpus.tokens
    while True:
        starts = torch.randint(len(tokens) - length - 1, (SIZE,))
        windows = [tokens[start : start + length + 1].astype(np.int64) for start in starts]
        yield torch.stack([torch.from_numpy(window) for window in windows])


def datasets_batches(corpus: TokenFile, length: int, folder: Path) -> Iterator[torch.Tensor]:
    """Rows of Arrow, formatted as torch's, in a DataLoader."""
    datasets = importlib.import_module("datasets")
    if not folder.exists():
        starts = range(0, len(corpus) - length, length)
        rows = [corpus.tokens[start : start + length + 1].astype(np.int64) for start in starts]
        datasets.Dataset.from_dict({"tokens": rows}).save_to_disk(folder)
    data: Any = datasets.load_from_disk(folder).with_format("torch")
    while True:
        loader = torch.utils.data.DataLoader(data, SIZE, shuffle=True, drop_last=True)
        for batch in loader:
            yield batch["tokens"]


def streaming_batches(corpus: TokenFile, length: int, folder: Path) -> Iterator[torch.Tensor]:
    """Samples of MosaicML's shards, in its DataLoader, without workers as the others are."""
    while True:
        yield from streaming_loader(corpus, length, folder)


@functools.cache
def streaming_loader(corpus: TokenFile, length: int, folder: Path) -> Any:
    """Made once: each dataset keeps threads that go on polling."""
    streaming = importlib.import_module("streaming")
    columns = {"tokens": f"ndarray:{corpus.tokens.dtype.name}:{length + 1}"}
    with streaming.MDSWriter(out=str(folder), columns=columns) as writer:
        for start in range(0, len(corpus) - length, length):
            writer.write({"tokens": corpus.tokens[start : start + length + 1]})
    data = streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=SIZE)

    def joined(samples: list[dict[str, np.ndarray]]) -> torch.Tensor:
        return torch.stack(
            [torch.from_numpy(sample["tokens"].astype(np.int64)) for sample in samples]
        )

    return streaming.StreamingDataLoader(data, batch_size=SIZE, drop_last=True, collate_fn=joined)


def seconds(batches: Iterator[torch.Tensor]) -> float:
    """Of `BATCHES`, after a first one."""
    next(batches)
    began = time.process_time()
    for _ in islice(batches, BATCHES):
        pass
    return time.process_time() - began


def compare(what: str, ours: Callable[[], float], theirs: Callable[[], float], rounds: int) -> None:
    """Prints by how much faster we are; both return their rate."""
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    ratios = [mine / other for mine, other in pairs]
    mine, other = (statistics.median(rates) for rates in zip(*pairs, strict=True))
    sys.stdout.write(
        f"{what}: {mine:,.2f} against {other:,.2f}, ratio {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} .. {max(ratios):.3f})\n"
    )
    claim, _, against = what.partition(": harness against ")
    tell(Row(claim, mine, "per s of CPU", against, other, min(ratios), max(ratios)))


def trained_tokenizer(path: Path, files: list[Path]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(vocab_size=16_000, special_tokens=["<|endoftext|>"])
    tokenizer.train([str(file) for file in files[:200]], trainer)
    tokenizer.save(str(path))


def sources(directory: Path, megabytes: int) -> Path:
    """A folder of that many MB of Python's sources."""
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for file in sorted(library.rglob("*.py")):
        try:
            texts.append(file.read_text("utf-8"))
        except UnicodeDecodeError:
            continue
    folder, size, number = directory / "texts", 0, 0
    folder.mkdir()
    while size < megabytes * 10**6:
        path = folder / f"{number:07}.txt"
        path.write_text(texts[number % len(texts)], "utf-8")
        size, number = size + path.stat().st_size, number + 1
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--mb", type=int, default=64)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        folder = sources(directory, options.mb)
        tokenizer = directory / "tokenizer.json"
        trained_tokenizer(tokenizer, files_of(folder))
        compare_preparing(folder, tokenizer, directory / "corpus", min(options.rounds, 3))
        corpus = TokenFile(directory / "corpus")
        compare_reading(corpus, options.length, options.rounds, directory)
    lengths = np.random.default_rng(0).lognormal(5.0, 1.0, 3000).clip(1, 1024).astype(int)
    documents = [torch.zeros(length, dtype=torch.int64) for length in lengths]
    for method in ("first_fit", "greedy", "concatenate"):
        packed = Packed(Lengths(documents), 1024, method=method)
        sys.stdout.write(f"packing, {method}: {packed.efficiency:.2%} are tokens\n")


class Lengths(list[torch.Tensor]):
    """Documents in memory."""

    @property
    def lengths(self) -> list[int]:
        return [len(document) for document in self]


def compare_preparing(folder: Path, tokenizer: Path, corpus: Path, rounds: int) -> None:
    from tokenizers import Tokenizer

    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    settings = Options(str(tokenizer))

    def ours() -> float:
        began = time.process_time()
        prepare([folder], corpus, settings, lambda text: None)
        return size / (time.process_time() - began)

    def theirs() -> float:
        encoder = Tokenizer.from_file(str(tokenizer))
        texts = (text for file in files_of(folder) for text in texts_of(file, settings))
        batches = list(batches_of(texts, int))
        began = time.process_time()
        for batch in batches:
            encoder.encode_batch_fast(batch, add_special_tokens=False)
        return size / (time.process_time() - began)

    compare("preparing, MB/s: harness against tokenizers alone", ours, theirs, rounds)


def compare_reading(corpus: TokenFile, length: int, rounds: int, folder: Path) -> None:
    rows, shards = folder / "rows", folder / "shards"
    others: dict[str, Callable[[], Iterator[torch.Tensor]]] = {
        "a numpy memmap": lambda: numpy_batches(corpus, length)
    }
    known: dict[str, tuple[str, Callable[[], Iterator[torch.Tensor]]]] = {
        "datasets": ("datasets", lambda: datasets_batches(corpus, length, rows)),
        "streaming": ("mosaicml-streaming", lambda: streaming_batches(corpus, length, shards)),
    }
    for module, (package, make) in known.items():
        try:
            others[f"{package} {importlib.import_module(module).__version__}"] = make
        except ImportError:
            sys.stdout.write(f"{package} is not installed: not compared\n")
    tokens = BATCHES * SIZE * length / 1e6
    for name, make in others.items():
        compare(
            f"reading, million tokens/s: harness against {name}",
            lambda: tokens / seconds(harness_batches(corpus, length)),
            lambda make=make: tokens / seconds(make()),
            rounds,
        )


if __name__ == "__main__":
    main()
