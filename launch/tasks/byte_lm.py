"""A byte-level language model of text that comes with every Python: its standard library's source.

A decoder-only transformer without biases: pre-norm RMSNorm (Zhang & Sennrich 2019, "Root Mean
Square Layer Normalization"), rotary positions (Su et al. 2021, "RoFormer"), SwiGLU (Shazeer 2020,
"GLU Variants Improve Transformer") and causal attention.

Tensor names end in their shape: B batch, T time, D model, H heads, K head size, R = K/2 rotary
pairs, F hidden, V vocabulary (256 bytes), N bytes of a text.
"""

import os
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.data import Dataset

from harness.config import Config, Section
from harness.errors import ConfigError
from harness.task import Stats, Task

VOCABULARY = 256
NOT_PROSE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
"""Folders of the standard library that are left out: other people's packages, tests, and the code
page tables, whose near-copies would make the held-out loss look better."""


class TransformerArgs(Section):
    """The size of the transformer."""

    dim: int = Field(default=128, ge=1)
    """Width of the residual stream."""
    layers: int = Field(default=4, ge=1)
    """Transformer blocks."""
    heads: int = Field(default=4, ge=1)
    """Attention heads; dim / heads must be an even integer."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of dropping an attention weight or an element of a residual branch."""

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.dim % self.heads:
            raise ValueError(f"dim = {self.dim} is not divisible by heads = {self.heads}")
        if self.dim // self.heads % 2:
            raise ValueError(
                f"dim / heads = {self.dim // self.heads} is odd, but rotary positions turn pairs"
            )
        return self


class ByteLMArgs(TransformerArgs):
    """[task] args = {...} of this task."""

    path: Path | None = None
    """Folder of text files to learn from; None is this Python's standard library."""
    seq_len: int = Field(default=256, ge=1)
    """Bytes in the model's context."""
    eval_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Fraction of the files to hold out."""
    eval_windows: int = Field(default=256, ge=1)
    """Windows of the held-out text, evenly spread, in one evaluation: with the defaults about 2 s
    on two CPU cores."""
    sample_bytes: int = Field(default=200, ge=1)
    """Bytes that the live command `sample PROMPT` adds to a text."""


def build(config: Config) -> Task:
    """The task of `config.task.args`, with one engine, "lm".

    Raises pydantic's ValidationError for wrong arguments, and what `read_texts` and `Windows` raise
    for wrong data. A folder with a single file has no held-out data.
    """
    args = ByteLMArgs.model_validate(config.task.args)
    train, held_out = split(read_texts(args.path), args.eval_fraction)
    return Task(
        models={"lm": ByteLM(args)},
        train_data=Windows(join(train), args.seq_len),
        eval_data=Windows(join(held_out), args.seq_len, args.eval_windows) if held_out else None,
        feeder=feed,
        commands={"sample": sampler(args)},
        count=lambda batch_BT: (len(batch_BT), len(batch_BT) * args.seq_len),
    )


def feed(engine: Any, batch_BT: Tensor) -> tuple[Tensor, Stats]:
    """Predicts every byte of a uint8 batch [B, T + 1] from those before it.

    Returns the mean cross entropy, in nats per byte (float32, 0-dim), and {"accuracy": the share of
    bytes whose most likely prediction is right}.
    """
    bytes_BT = batch_BT.to(engine.device, torch.long)
    logits_BTV = engine(bytes_BT[:, :-1])
    target_BT = bytes_BT[:, 1:]
    loss = F.cross_entropy(logits_BTV.float().flatten(0, 1), target_BT.flatten())
    hits_BT = logits_BTV.detach().argmax(-1) == target_BT
    return loss, {"accuracy": hits_BT.float().mean()}


def sampler(args: ByteLMArgs) -> Callable[..., str]:
    """The live command `sample PROMPT`."""

    def sample(engines: Any, *words: str) -> str:
        """Continues a text with the model: sample PROMPT."""
        device = engines["lm"].device
        devices = [device] if device.type != "cpu" else []
        with engines.lend("lm") as model, torch.random.fork_rng(devices):
            torch.manual_seed(engines.global_step)  # all ranks draw the same bytes
            model.eval()
            text = " ".join(words) or "def "
            return continued(model, text.encode(), args.sample_bytes, args.seq_len, device)

    return sample


@torch.no_grad()
def continued(model: nn.Module, text: bytes, count: int, context: int, device: torch.device) -> str:
    """`text` and `count` more bytes, each drawn from what the model predicts after the last
    `context` ones. At ZeRO 3 a collective: each byte gathers the weights from all ranks."""
    found = bytearray(text)
    for _ in range(count):
        bytes_BT = torch.tensor([list(found[-context:])], device=device)
        logits_V = model(bytes_BT)[0, -1].float()
        found.append(int(torch.multinomial(logits_V.softmax(-1), 1)))
    return found.decode(errors="replace")


# ---------------------------------------------------------------------------------------- the data


def read_texts(path: Path | None) -> dict[str, bytes]:
    """The texts below a folder by relative path, sorted; None: the standard library's *.py files.

    Hidden files, and files that are empty, not UTF-8 or hold a NUL byte, are not text. Raises
    ConfigError if `path` is not a folder, or no text is below it.
    """
    root = path or Path(sysconfig.get_paths()["stdlib"])
    if not root.is_dir():
        raise ConfigError(f"task.args.path: no such folder: {root.absolute()}")
    files = _walk(root, skip=set()) if path else _walk(root, skip=NOT_PROSE, suffix=".py")
    texts = {file.relative_to(root).as_posix(): file.read_bytes() for file in files}
    texts = {name: texts[name] for name in sorted(texts) if _is_text(texts[name])}
    if not texts:
        raise ConfigError(f"task.args.path: no text files below {root.absolute()}")
    return texts


def _walk(root: Path, skip: set[str], suffix: str = "") -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skip and not name.startswith(".")]
        for file in (Path(folder, name) for name in names):
            if file.name.endswith(suffix) and not file.name.startswith(".") and file.is_file():
                yield file


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return bool(content) and b"\0" not in content


def split(
    texts: dict[str, bytes], eval_fraction: float
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """`(train, held_out)`: entire files, chosen by the CRC-32 of their names.

    The same on every machine that has the same files. Of two files or more, each side gets at
    least one; a single file is for training.
    """
    ranked = sorted(texts, key=lambda name: (zlib.crc32(name.encode()), name))
    count = min(max(1, round(len(texts) * eval_fraction)), len(texts) - 1)
    held_out = set(ranked[:count])
    return (
        {name: text for name, text in texts.items() if name not in held_out},
        {name: text for name, text in texts.items() if name in held_out},
    )


def join(texts: dict[str, bytes]) -> Tensor:
    """All texts in order, with a NUL byte between two, as uint8 [N]."""
    return torch.frombuffer(bytearray(b"\0".join(texts.values())), dtype=torch.uint8)


class Windows(Dataset[Tensor]):
    """A text cut into uint8 windows [seq_len + 1]; the last byte of one is the first of the next.

    With `count`, only that many, evenly spread over the text. Raises ValueError for a text
    that is shorter than a window.
    """

    def __init__(self, text_N: Tensor, seq_len: int, count: int | None = None) -> None:
        self.text_N, self.seq_len = text_N, seq_len
        self.total = (len(text_N) - 1) // seq_len
        if self.total < 1:
            raise ValueError(
                f"a text of {len(text_N)} bytes has no window of seq_len + 1 = {seq_len + 1} bytes"
            )
        self.count = min(count or self.total, self.total)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self.count:
            raise IndexError(f"window {index} of {self.count}")
        start = index * self.total // self.count * self.seq_len
        return self.text_N[start : start + self.seq_len + 1]


# --------------------------------------------------------------------------------------- the model


class ByteLM(nn.Module):
    """The language model. Untrained, it is nearly uniform: its loss is about ln 256 = 5.55."""

    def __init__(self, args: TransformerArgs, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.head_size = args.dim // args.heads
        self.embed = nn.Embedding(vocabulary, args.dim)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.dropout = nn.Dropout(args.dropout)
        self.blocks = nn.ModuleList(Block(args) for _ in range(args.layers))
        self.norm = nn.RMSNorm(args.dim)
        self.head = linear(args.dim, vocabulary)

    def forward(self, bytes_BT: Tensor, mask_B1TT: Tensor | None = None) -> Tensor:
        """Logits [B, T, V], in the weights' dtype, of the byte after each of the int64 [B, T].

        `mask_B1TT`: bool, which position sees which; None: all before it. Positions are relative,
        so documents that do not see each other need none of their own.
        """
        cos_TR, sin_TR = rotation(bytes_BT.shape[1], self.head_size, bytes_BT.device)
        x_BTD = self.dropout(self.embed(bytes_BT))
        for block in self.blocks:
            x_BTD = block(x_BTD, cos_TR, sin_TR, mask_B1TT)
        return self.head(self.norm(x_BTD))


class Block(nn.Module):
    """Attention, then SwiGLU: each reads a normed stream and adds its dropped-out result to it."""

    def __init__(self, args: TransformerArgs) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(args.dim)
        self.attention = Attention(args)
        self.swiglu_norm = nn.RMSNorm(args.dim)
        self.swiglu = SwiGLU(args)
        self.dropout = nn.Dropout(args.dropout)

    def forward(
        self, x_BTD: Tensor, cos_TR: Tensor, sin_TR: Tensor, mask_B1TT: Tensor | None = None
    ) -> Tensor:
        """The stream [B, T, D] after this block."""
        normed_BTD = self.attention_norm(x_BTD)
        x_BTD = x_BTD + self.dropout(self.attention(normed_BTD, cos_TR, sin_TR, mask_B1TT))
        return x_BTD + self.dropout(self.swiglu(self.swiglu_norm(x_BTD)))


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions."""

    def __init__(self, args: TransformerArgs) -> None:
        super().__init__()
        self.heads, self.dropout = args.heads, args.dropout
        self.qkv = linear(args.dim, 3 * args.dim)
        self.project = linear(args.dim, args.dim, residuals=2 * args.layers)

    def forward(
        self, x_BTD: Tensor, cos_TR: Tensor, sin_TR: Tensor, mask_B1TT: Tensor | None = None
    ) -> Tensor:
        """What each position attends to in itself and those before it, [B, T, D]."""
        q_BHTK, k_BHTK, v_BHTK = (
            part_BTD.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part_BTD in self.qkv(x_BTD).chunk(3, dim=-1)
        )
        y_BHTK = F.scaled_dot_product_attention(
            rotate(q_BHTK, cos_TR, sin_TR),
            rotate(k_BHTK, cos_TR, sin_TR),
            v_BHTK,
            attn_mask=mask_B1TT,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask_B1TT is None,
        )
        return self.project(y_BHTK.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`, 8/3 as wide as the stream, rounded up to a multiple of 32."""

    def __init__(self, args: TransformerArgs) -> None:
        super().__init__()
        hidden = 32 * -(-args.dim * 8 // 96)
        self.gate_up = linear(args.dim, 2 * hidden)
        self.down = linear(hidden, args.dim, residuals=2 * args.layers)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """A new [B, T, D], position by position."""
        gate_BTF, up_BTF = self.gate_up(x_BTD).chunk(2, dim=-1)
        return self.down(F.silu(gate_BTF) * up_BTF)


def rotation(time: int, head_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [T, R], of the angle t / 10000^(r / R) of pair r at position t.

    Recomputed in every forward, at next to no cost: a buffer would lose precision if the model, or
    DeepSpeed with `buffer_dtype = "model"`, were cast to a 16-bit type.
    """
    pairs = head_size // 2
    frequency_R = 10000.0 ** -(torch.arange(pairs, device=device, dtype=torch.float32) / pairs)
    angle_TR = torch.outer(torch.arange(time, device=device, dtype=torch.float32), frequency_R)
    return angle_TR.cos(), angle_TR.sin()


def rotate(x_BHTK: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Turns the pairs (x[r], x[r + R]) of every head by their angles; float32 inside, as x outside.

    The dot product of two turned vectors depends on their distance in time only.
    """
    a_BHTR, b_BHTR = x_BHTK.float().chunk(2, dim=-1)
    turned = (a_BHTR * cos_TR - b_BHTR * sin_TR, b_BHTR * cos_TR + a_BHTR * sin_TR)
    return torch.cat(turned, dim=-1).type_as(x_BHTK)


def linear(fan_in: int, fan_out: int, residuals: int = 1) -> nn.Linear:
    """Without bias; normal weights, smaller where `residuals` such maps add up in the stream."""
    linear = nn.Linear(fan_in, fan_out, bias=False)
    nn.init.normal_(linear.weight, std=0.02 * residuals**-0.5)
    return linear
