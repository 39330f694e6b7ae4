"""The task of audio codes: its sounds, its codes, its patterns; and it learns."""

import math
import wave
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import codec_lm
import pytest
import torch
from codec_lm import CodecLM, CodecLMArgs, build, feed, pad, quantize, read_sounds, resample
from pydantic import ValidationError
from torch import Tensor

from harness.config import Config
from harness.config.command_line import parse_args
from harness.config.sections import TaskConfig
from harness.errors import ConfigError
from harness.run import run_in_world
from harness.testing.pool import RankPool
from tests.support.helpers import records

RATE = 11025
PATTERNS = ("parallel", "delay", "unrolled", "coarse_first")


def sweep(seconds: float) -> Tensor:
    """A tone that rises and falls, float64 [N], the same every 32 frames of 64."""
    turn_N = torch.arange(int(seconds * RATE), dtype=torch.float64) / 2048 * 2 * torch.pi
    return 0.5 * torch.sin(300 * turn_N + 150 * torch.sin(turn_N))


def write(file: Path, wave_N: Tensor, width: int = 2, channels: int = 1) -> None:
    """Writes the sound, with all of it in the first channel and silence in the others."""
    half = 1 << 8 * width - 1
    values = [int(v) for v in (wave_N * (half - 1)).round().tolist()]
    offset, signed = (half, False) if width == 1 else (0, True)
    silence = offset.to_bytes(width, "little") * (channels - 1)
    with wave.open(str(file), "wb") as sound:
        sound.setnchannels(channels)
        sound.setsampwidth(width)
        sound.setframerate(RATE)
        sound.writeframes(
            b"".join(
                (v + offset).to_bytes(width, "little", signed=signed) + silence for v in values
            )
        )


@pytest.fixture(scope="session")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two sounds, about 500 frames."""
    folder = tmp_path_factory.mktemp("sounds")
    (folder / "sub").mkdir()
    write(folder / "long.wav", sweep(2.0))
    write(folder / "sub" / "short.WAV", sweep(0.9).flip(0), width=1)
    return folder


def config(**args: Any) -> Config:
    """A config with these task arguments and nothing else."""
    return Config.model_construct(task=TaskConfig.model_construct(args=args))


class FakeEngine:
    """What the feeder asks of an engine: a call and a device."""

    device = torch.device("cpu")

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, sequence_BKS: Tensor) -> Tensor:
        return self.model(sequence_BKS)


# --------------------------------------------------------------------------------------- the sound


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_sound_of_any_sample_width_is_read_exactly(
    tmp_path: Path, width: int, channels: int
) -> None:
    write(tmp_path / "a.wav", sweep(0.1), width, channels)
    (found_N,) = read_sounds(tmp_path, RATE)
    assert found_N.dtype == torch.float64
    step = 2.0 ** (1 - 8 * width)
    torch.testing.assert_close(found_N * channels, sweep(0.1), rtol=0, atol=2 * step)


def test_another_rate_is_the_same_sound() -> None:
    def tone(rate: int) -> Tensor:
        return torch.sin(2 * torch.pi * 50 * torch.arange(rate, dtype=torch.float64) / rate)

    for rate in (4000, 11025):
        torch.testing.assert_close(resample(tone(8000), 8000, rate), tone(rate))


def test_files_are_sorted_and_unreadable_ones_are_skipped(sounds: Path) -> None:
    (sounds / "broken.wav").write_bytes(b"RIFF")
    (sounds / "notes.txt").touch()
    try:
        assert [len(wave_N) for wave_N in read_sounds(sounds, RATE)] == [22050, 9922]
    finally:
        (sounds / "broken.wav").unlink()


def test_missing_sounds_are_reported(tmp_path: Path, sounds: Path) -> None:
    with pytest.raises(ConfigError, match=r"task.args.path: no such folder: .*nowhere"):
        build(config(path=tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"no readable \.wav files below"):
        build(config(path=tmp_path))
    (tmp_path / "cut.wav").write_bytes(b"RIFF")
    write(tmp_path / "silent.wav", torch.zeros(0))
    with pytest.raises(ConfigError, match=r"; cut.wav: truncated; silent.wav: no samples"):
        build(config(path=tmp_path))
    with pytest.raises(ConfigError, match=r"too little audio: found \d+ clips, with \d+ training"):
        build(config(path=sounds, codebook_size=5000))
    with (
        patch.object(codec_lm, "find_spec", lambda name: None),
        pytest.raises(ConfigError, match="pip install pygame-ce"),
    ):
        build(config())


# --------------------------------------------------------------------------------------- the codes


def test_every_codebook_reduces_the_error(sounds: Path) -> None:
    frames_TF = torch.cat([codec_lm.spectrum(s_N, hop=64) for s_N in read_sounds(sounds, RATE)])
    books_KVF = codec_lm.learn_codebooks(frames_TF, codebooks=4, size=16)
    tokens_KT = quantize(frames_TF, books_KVF)
    assert torch.equal(tokens_KT, quantize(frames_TF, codec_lm.learn_codebooks(frames_TF, 4, 16)))
    rest_TF = frames_TF - frames_TF.mean(0)
    errors = [rest_TF.square().sum()]
    rest_TF = frames_TF
    for book_VF, tokens_T in zip(books_KVF, tokens_KT, strict=True):
        rest_TF = rest_TF - book_VF[tokens_T]
        errors.append(rest_TF.square().sum())
    assert all(after < 0.9 * before for before, after in pairwise(errors))
    assert errors[-1] < 0.05 * errors[0]


def test_a_centre_is_the_mean_of_its_points() -> None:
    points_NF = torch.randn(200, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    centres_VF = codec_lm.k_means(points_NF, 4, seed=0)
    chosen_N = codec_lm.nearest(points_NF, centres_VF)
    for number, centre_F in enumerate(centres_VF):
        torch.testing.assert_close(
            centre_F, points_NF[chosen_N == number].mean(0), atol=0.05, rtol=0
        )


# ------------------------------------------------------------------------------------ the patterns


def test_patterns_change_the_sequence_but_not_the_loss(sounds: Path) -> None:
    found = {name: build(config(path=sounds, pattern=name)) for name in PATTERNS}
    clips = found["delay"].train_data.clips
    for name, task in found.items():
        args = CodecLMArgs(pattern=name)  # pyright: ignore[reportArgumentType]
        data = task.train_data
        assert data.lengths == [data[i].shape[1] - 1 for i in range(len(data))]
        for sequence_KS, tokens_KT, same_KT in zip(data, clips, data.clips, strict=True):
            assert torch.equal(tokens_KT, same_KT)
            pattern = args.pattern_of(tokens_KT.shape[1])
            assert torch.equal(pattern.revert(sequence_KS[None], empty=16)[0][0], tokens_KT)
        batch_BKS = task.collate([data[i] for i in range(len(data))])
        assert task.count(batch_BKS) == (len(data), sum(clip.numel() for clip in clips))
        blind = FakeEngine(lambda seen_BKS: torch.zeros(*seen_BKS.shape, 16))
        loss, stats = feed(16, blind, batch_BKS)
        assert list(stats) == [f"codebook_{k}" for k in range(4)]
        assert [loss, *stats.values()] == pytest.approx([math.log(16)] * 5)
    steps = [found[name].train_data.lengths[0] for name in PATTERNS]
    frames = clips[0].shape[1]
    assert steps == [frames, frames + 3, 4 * frames, 2 * frames]


def test_the_loss_of_a_codebook_is_that_of_its_tokens() -> None:
    """Of two clips of unlike length: one codebook foreseen, the other not at all."""
    args = CodecLMArgs(codebooks=2)
    clips = [torch.randint(16, (1, 2, frames)) for frames in (5, 9)]
    pairs = [args.pattern_of(c.shape[2]).build(c, 16)[0][0] for c in clips]
    batch_BKS = pad(16, pairs)
    logits_BKSV = 50 * torch.nn.functional.one_hot(batch_BKS[..., 1:], 17)[..., :16].float()
    logits_BKSV[:, 1] = 0
    _, stats = feed(16, FakeEngine(lambda seen_BKS: logits_BKSV), batch_BKS)
    assert stats["codebook_0"] < 1e-6
    assert stats["codebook_1"] == pytest.approx(math.log(16))


@pytest.mark.parametrize("name", PATTERNS)
def test_padding_changes_nothing_and_the_model_sees_only_the_past(name: str, sounds: Path) -> None:
    torch.manual_seed(0)
    task = build(config(path=sounds, pattern=name, dim=32, layers=2, clip=40))
    engine = FakeEngine(task.models["lm"].eval())
    data = task.train_data
    by_length = sorted(range(len(data)), key=data.lengths.__getitem__)
    unlike = [data[by_length[0]], data[by_length[-1]]]
    assert unlike[0].shape != unlike[1].shape
    together, _ = feed(16, engine, task.collate(unlike))
    alone = [feed(16, engine, task.collate([one]))[0] for one in unlike]
    torch.testing.assert_close(together, torch.stack(alone).mean())
    seen_BKS = unlike[1][None]
    other_BKS = seen_BKS.clone()
    other_BKS[..., 20:] = (other_BKS[..., 20:] + 1) % 17
    before, after = (engine(x_BKS)[:, :, :20] for x_BKS in (seen_BKS, other_BKS))
    torch.testing.assert_close(before, after)
    assert not torch.equal(engine(seen_BKS)[:, :, 20], engine(other_BKS)[:, :, 20])


def test_embeddings_differ_by_codebook() -> None:
    torch.manual_seed(0)
    model = CodecLM(CodecLMArgs(dim=32, layers=1))
    batch_BKS = torch.randint(16, (1, 4, 9))
    assert not torch.allclose(model(batch_BKS), model(batch_BKS.roll(1, dims=1)))


def test_untrained_loss_is_uniform() -> None:
    torch.manual_seed(0)
    batch_BKS = torch.randint(16, (4, 4, 33))
    loss, _ = feed(16, FakeEngine(CodecLM(CodecLMArgs())), batch_BKS)
    assert loss.item() == pytest.approx(math.log(16), abs=0.1)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ({"pattern": "parallel", "delays": (0, 1, 2, 3)}, "delays is not an option of pattern"),
        ({"flattening": (0, 1, 1, 1)}, "flattening is not an option of pattern = 'delay'"),
        ({"delays": (0, 1)}, "delays: expected 4 numbers >= 0, found [0, 1]"),
        ({"pattern": "zigzag"}, "Input should be 'parallel', 'delay'"),
        ({"dim": 30}, "dim = 30 is not divisible by heads = 4"),
    ],
)
def test_wrong_arguments_are_reported(args: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError) as caught:
        build(config(**args))
    assert told in str(caught.value)


# ---------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("name", ["delay", pytest.param("coarse_first", marks=pytest.mark.slow)])
def test_it_learns(two_ranks: RankPool, tmp_path: Path, sounds: Path, name: str) -> None:
    """From the shipped config, on pygame's sounds where they are installed."""
    words = ["--config", "launch/tasks/codec_lm.toml", f"--run.dir={tmp_path}", "--run.steps=30"]
    words += ["--trainer.eval_every=30", "--engines.lm.optimizer.lr=5e-3"]
    words += ["--control.stdin=false", "--control.socket=false", f"--task.args.pattern={name}"]
    words += [] if find_spec("pygame") else [f"--task.args.path={sounds}"]
    given = parse_args(words)
    two_ranks.run(run_in_world, given)
    first, last = records(given, "eval/")
    assert last["eval/loss"] < 0.9 * first["eval/loss"]
    assert last["eval/codebook_0"] < 0.7 * first["eval/codebook_0"]
    losses = [record["loss"] for record in records(given)]
    assert len(losses) == 30 and losses[-1] < 0.8 * losses[0]
