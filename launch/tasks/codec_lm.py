"""A language model of audio codes: several codebooks, in the order of a codebook pattern.

The model is a small MusicGen (Copet et al., "Simple and Controllable Music Generation", 2023): at
each step it sums the embeddings of all codebooks, and predicts the next token of each. Instead of a
codec, the log-magnitude spectrum of each frame goes through residual vector quantization
(Zeghidour et al., "SoundStream: An End-to-End Neural Audio Codec", 2021) with k-means codebooks.

Tensor names end in their shape: B batch, K codebooks, T timesteps (frames), S steps of a sequence,
V codebook size, D model, F frequency bands, C channels, N any count.
"""

import wave
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from byte_lm import Block, TransformerArgs, linear, rotation
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.data import Dataset

from harness.config import Config
from harness.errors import ConfigError
from harness.pattern import Pattern, coarse_first, delay, parallel, unrolled
from harness.task import Stats, Task

PATTERNS: dict[str, Callable[..., Pattern]] = {
    "parallel": parallel,
    "delay": delay,
    "unrolled": unrolled,
    "coarse_first": coarse_first,
}
BANDS = 16
"""Bands of a spectrum, of equal width: few enough that every token is used."""
FLOOR = 1e-2
"""Magnitude that counts as silence."""
ROUNDS = 20
"""Rounds of k-means."""


class CodecLMArgs(TransformerArgs):
    """[task] args = {...} of this task."""

    path: Path | None = None
    """Folder of .wav files to learn from; None is the sounds that pygame ships."""
    sample_rate: int = Field(default=11025, ge=1)
    """Samples per second, to which every recording is resampled."""
    hop: int = Field(default=64, ge=1)
    """Samples from a frame to the next; a frame is 4 hops long."""
    clip: int = Field(default=64, ge=1)
    """Maximum frames of a clip: recordings are cut, and the remainder is a shorter clip."""
    eval_fraction: float = Field(default=0.125, gt=0, le=0.5)
    """Fraction of the clips to hold out, evenly spread."""
    codebooks: int = Field(default=4, ge=1)
    """Tokens per frame."""
    codebook_size: int = Field(default=16, ge=2)
    """Distinct tokens per codebook."""
    pattern: Literal["parallel", "delay", "unrolled", "coarse_first"] = "delay"
    """The order in which the model sees the tokens: docs/patterns.md."""
    delays: tuple[int, ...] | None = None
    """Delay of each codebook in steps; None: the pattern's default. "parallel" takes none."""
    flattening: tuple[int, ...] | None = None
    """"unrolled" only: the inner step of each codebook."""

    @model_validator(mode="after")
    def _pattern_fits(self) -> Self:
        options = {"parallel": set(), "unrolled": {"delays", "flattening"}}
        for name in self._pattern_options().keys() - options.get(self.pattern, {"delays"}):
            raise ValueError(f"{name} is not an option of pattern = {self.pattern!r}")
        self.pattern_of(1)
        return self

    def _pattern_options(self) -> dict[str, tuple[int, ...]]:
        options = {"delays": self.delays, "flattening": self.flattening}
        return {name: numbers for name, numbers in options.items() if numbers is not None}

    def pattern_of(self, timesteps: int) -> Pattern:
        """The configured pattern. Raises ValueError if its options are invalid."""
        return PATTERNS[self.pattern](self.codebooks, timesteps, **self._pattern_options())


def build(config: Config) -> Task:
    """The task of `config.task.args`, with one engine, "lm".

    Raises pydantic's ValidationError for wrong arguments, and ConfigError for a folder without
    sounds, or with fewer of them than the codebooks and the held-out clips need.
    """
    args = CodecLMArgs.model_validate(config.task.args)
    spectra = [spectrum(wave_N, args.hop) for wave_N in read_sounds(args.path, args.sample_rate)]
    clips = [clip_TF for spectrum_TF in spectra for clip_TF in spectrum_TF.split(args.clip)]
    train, held_out = split(clips, args.eval_fraction)
    if (frames := sum(map(len, train))) < args.codebook_size or not held_out:
        raise ConfigError(
            f"task.args.path: too little audio: found {len(clips)} clips, with {frames} training "
            f"frames; expected at least 2 clips and codebook_size = {args.codebook_size} frames"
        )
    books_KVF = learn_codebooks(torch.cat(train), args.codebooks, args.codebook_size)
    return Task(
        models={"lm": CodecLM(args)},
        train_data=Sequences([quantize(clip_TF, books_KVF) for clip_TF in train], args),
        eval_data=Sequences([quantize(clip_TF, books_KVF) for clip_TF in held_out], args),
        feeder=partial(feed, args.codebook_size),
        collate=partial(pad, args.codebook_size),
        count=lambda batch_BKS: (len(batch_BKS), int((batch_BKS != args.codebook_size).sum())),
    )


def feed(empty: int, engine: Any, batch_BKS: Tensor) -> tuple[Tensor, Stats]:
    """Predicts every token of an int64 batch from the steps before its own.

    Returns the mean cross entropy, in nats per token (float32, 0-dim), and that of every codebook,
    coarsest first. All clips count alike, and so do all codebooks, in every pattern.
    """
    sequence_BKS = batch_BKS.to(engine.device)
    logits_BKSV = engine(sequence_BKS[..., :-1]).float()
    target_BKS = sequence_BKS[..., 1:]
    loss_N = F.cross_entropy(
        logits_BKSV.flatten(0, 2), target_BKS.flatten(), ignore_index=empty, reduction="none"
    )
    loss_BK = loss_N.view_as(target_BKS).sum(-1) / (target_BKS != empty).sum(-1)
    loss_K = loss_BK.mean(0)
    return loss_K.mean(), {f"codebook_{k}": loss for k, loss in enumerate(loss_K.detach())}


# --------------------------------------------------------------------------------------- the sound


def read_sounds(path: Path | None, sample_rate: int) -> list[Tensor]:
    """The .wav files below a folder, sorted by path: mono, float64 [N], from -1 to 1.

    None is the folder of pygame's examples. Files that Python's `wave` cannot read (compressed,
    floating-point) or that contain no samples are skipped. Raises ConfigError if nothing remains.
    """
    root = shipped_sounds() if path is None else path
    if not root.is_dir():
        raise ConfigError(f"task.args.path: no such folder: {root.absolute()}")
    sounds, errors = [], []
    for file in sorted(file for file in root.rglob("*") if file.suffix.lower() == ".wav"):
        try:
            wave_N, own_rate = read_wav(file)
        except (wave.Error, EOFError) as error:
            errors.append(f"; {file.relative_to(root)}: {str(error) or 'truncated'}")
        else:
            sounds.append(resample(wave_N, own_rate, sample_rate))
    if not sounds:
        raise ConfigError(
            f"task.args.path: no readable .wav files below {root.absolute()}" + "".join(errors)
        )
    return sounds


def shipped_sounds() -> Path:
    """The sounds of pygame's examples. Raises ConfigError if pygame is not installed."""
    pygame = find_spec("pygame")  # found, but not imported: that would open a display
    if pygame is None or not pygame.submodule_search_locations:
        raise ConfigError(
            "this task learns from the sounds that pygame ships: pip install pygame-ce, or set "
            "task.args.path to a folder of .wav files (for instance /usr/share/sounds/alsa, from "
            "Debian's alsa-utils)"
        )
    return Path(pygame.submodule_search_locations[0]) / "examples/data"


def read_wav(file: Path) -> tuple[Tensor, int]:
    """`(wave_N, sample_rate)` of a PCM file of 8 to 32 bits, its channels averaged.

    Raises wave.Error, or EOFError, for other files, and for those without a sample.
    """
    with wave.open(str(file), "rb") as sound:
        channels, width, rate = sound.getnchannels(), sound.getsampwidth(), sound.getframerate()
        content = sound.readframes(sound.getnframes())
    frames = len(content) // (channels * width)
    if not frames:
        raise wave.Error("no samples")
    bytes_N = torch.frombuffer(bytearray(content), dtype=torch.uint8)[: frames * channels * width]
    value_NC = (bytes_N.view(frames, channels, width).long() << 8 * torch.arange(width)).sum(-1)
    half = 1 << 8 * width - 1
    if width > 1:  # in two's complement; bytes are unsigned, with silence at 128
        value_NC = (value_NC + half) % (2 * half)
    return (value_NC - half).double().mean(-1) / half, rate


def resample(wave_N: Tensor, own_rate: int, rate: int) -> Tensor:
    """The same sound at another rate: its Fourier series, truncated or padded with zeros."""
    if own_rate == rate:
        return wave_N
    length = max(1, round(len(wave_N) * rate / own_rate))
    return torch.fft.irfft(torch.fft.rfft(wave_N), n=length) * (length / len(wave_N))


def spectrum(wave_N: Tensor, hop: int) -> Tensor:
    """The log-magnitude spectrum in bands, [T, F], of frames of 4 hops under a Hann window."""
    size = 4 * hop
    window = torch.hann_window(size, dtype=wave_N.dtype)
    stft = torch.stft(wave_N, size, hop, window=window, pad_mode="constant", return_complex=True)
    return (F.adaptive_avg_pool1d(stft.abs().T, BANDS) + FLOOR).log()


# --------------------------------------------------------------------------------------- the codes


def split(clips: list[Tensor], eval_fraction: float) -> tuple[list[Tensor], list[Tensor]]:
    """`(train, held_out)`: every n-th clip is held out."""
    every = round(1 / eval_fraction)
    train = [clip for number, clip in enumerate(clips, start=1) if number % every]
    return train, clips[every - 1 :: every]


def learn_codebooks(frames_NF: Tensor, codebooks: int, size: int) -> Tensor:
    """Codebooks [K, V, F]: each the k-means of the residual of those before it.

    In float64, so that every rank gets the same ones.
    """
    books = []
    for number in range(codebooks):
        book_VF = k_means(frames_NF, size, seed=number)
        frames_NF = frames_NF - book_VF[nearest(frames_NF, book_VF)]
        books.append(book_VF)
    return torch.stack(books)


def k_means(points_NF: Tensor, count: int, seed: int) -> Tensor:
    """Lloyd's algorithm from `count` random points; a centre that no point is near stays."""
    generator = torch.Generator().manual_seed(seed)
    centres_VF = points_NF[torch.randperm(len(points_NF), generator=generator)[:count]]
    for _ in range(ROUNDS):
        chosen_N = nearest(points_NF, centres_VF)
        sizes_V1 = chosen_N.bincount(minlength=count)[:, None]
        sums_VF = torch.zeros_like(centres_VF).index_add_(0, chosen_N, points_NF)
        centres_VF = torch.where(sizes_V1 > 0, sums_VF / sizes_V1, centres_VF)
    return centres_VF


def nearest(points_NF: Tensor, centres_VF: Tensor) -> Tensor:
    """The index of the centre that is nearest to each point, int64 [N]."""
    return torch.cdist(points_NF, centres_VF).argmin(-1)


def quantize(frames_TF: Tensor, books_KVF: Tensor) -> Tensor:
    """Tokens, int64 [K, T]: of each codebook the entry nearest to the residual of those before."""
    tokens = []
    for book_VF in books_KVF:
        tokens.append(nearest(frames_TF, book_VF))
        frames_TF = frames_TF - book_VF[tokens[-1]]
    return torch.stack(tokens)


class Sequences(Dataset[Tensor]):
    """Clips in the order of the pattern, int64 [K, S]; `lengths`: the steps a model reads."""

    def __init__(self, clips: list[Tensor], args: CodecLMArgs) -> None:
        self.clips, self.args = clips, args
        self.lengths = [args.pattern_of(tokens_KT.shape[1]).steps - 1 for tokens_KT in clips]

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Tensor:
        tokens_KT = self.clips[index]
        pattern = self.args.pattern_of(tokens_KT.shape[1])
        sequence_1KS, _ = pattern.build(tokens_KT[None], self.args.codebook_size)
        return sequence_1KS[0]


def pad(empty: int, sequences: list[Tensor]) -> Tensor:
    """Sequences [K, S] as one batch [B, K, S], with `empty` after the shorter ones."""
    longest = max(sequence_KS.shape[1] for sequence_KS in sequences)
    return torch.stack(
        [F.pad(s_KS, (0, longest - s_KS.shape[1]), value=empty) for s_KS in sequences]
    )


# --------------------------------------------------------------------------------------- the model


class CodecLM(nn.Module):
    """The language model. Untrained its loss is about ln V in every codebook."""

    def __init__(self, args: CodecLMArgs) -> None:
        super().__init__()
        self.codebooks, self.head_size = args.codebooks, args.dim // args.heads
        self.symbols = args.codebook_size + 1
        """Tokens of a codebook, and "empty"."""
        self.embed = nn.Embedding(args.codebooks * self.symbols, args.dim)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.dropout = nn.Dropout(args.dropout)
        self.blocks = nn.ModuleList(Block(args) for _ in range(args.layers))
        self.norm = nn.RMSNorm(args.dim)
        self.head = linear(args.dim, args.codebooks * args.codebook_size)

    def forward(self, sequence_BKS: Tensor) -> Tensor:
        """Logits [B, K, S, V], in the weights' dtype, of the step after each of int64 [B, K, S]."""
        first_K1 = self.symbols * torch.arange(self.codebooks, device=sequence_BKS.device)[:, None]
        x_BSD = self.dropout(self.embed(sequence_BKS + first_K1).sum(1))
        cos_SR, sin_SR = rotation(x_BSD.shape[1], self.head_size, x_BSD.device)
        for block in self.blocks:
            x_BSD = block(x_BSD, cos_SR, sin_SR)
        logits_BSX = self.head(self.norm(x_BSD))
        return logits_BSX.unflatten(-1, (self.codebooks, -1)).transpose(1, 2)
