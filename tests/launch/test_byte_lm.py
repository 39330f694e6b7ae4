"""The default task: its data are whole, its model is causal, and it learns."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from harness.config import Config
from harness.config.sections import TaskConfig
from harness.errors import ConfigError
from launch.tasks.byte_lm import (
    Attention,
    ByteLM,
    ByteLMArgs,
    Windows,
    build,
    feed,
    join,
    read_texts,
    rotate,
    rotation,
    split,
)

TINY = ByteLMArgs(seq_len=32, dim=32, layers=2, heads=2)


class FakeEngine:
    """What the feeder asks of an engine: a call and a device."""

    device = torch.device("cpu")

    def __init__(self, model: ByteLM) -> None:
        self.model = model

    def __call__(self, bytes_BT: Tensor) -> Tensor:
        return self.model(bytes_BT)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    for index in range(20):
        (tmp_path / "sub" / f"{index}.txt").write_text(f"file {index} says so\n" * 20)
    (tmp_path / "README").write_text("naïve text")
    (tmp_path / "latin1.txt").write_bytes(b"na\xefve")
    (tmp_path / "binary").write_bytes(b"a\0b")
    (tmp_path / "empty.txt").touch()
    (tmp_path / ".hidden").write_text("hidden")
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / "dangling").symlink_to("nowhere")
    return tmp_path


def config(**args: Any) -> Config:
    """A config with these task arguments and nothing else."""
    return Config.model_construct(task=TaskConfig.model_construct(args=args))


# ---------------------------------------------------------------------------------------- the data


def test_standard_library_is_the_default_text() -> None:
    texts = read_texts(None)
    assert {"argparse.py", "json/decoder.py"} <= texts.keys()
    assert not any(name.startswith(("site-packages/", "test/", "encodings/")) for name in texts)
    assert list(texts) == sorted(texts)
    assert sum(map(len, texts.values())) > 5_000_000


def test_folder_holds_every_visible_text_file(folder: Path) -> None:
    texts = read_texts(folder)
    assert texts.keys() == {"README", *(f"sub/{index}.txt" for index in range(20))}
    assert texts["README"] == "naïve text".encode()


def test_no_such_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such folder: .*/nowhere"):
        read_texts(tmp_path / "nowhere")


def test_folder_without_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\0")
    with pytest.raises(ConfigError, match=f"no text files below {tmp_path}"):
        read_texts(tmp_path)


def test_split_is_disjoint_complete_and_the_same_in_any_order(folder: Path) -> None:
    texts = read_texts(folder)
    train, held_out = split(texts, 0.2)
    assert not train.keys() & held_out.keys()
    assert train | held_out == texts
    assert len(held_out) == round(0.2 * len(texts))
    assert split(dict(reversed(texts.items())), 0.2) == (train, held_out)


@pytest.mark.parametrize(("files", "held_out"), [(1, 0), (2, 1), (3, 1)])
@pytest.mark.parametrize("fraction", [0.001, 0.4])
def test_split_of_few_files(files: int, held_out: int, fraction: float) -> None:
    sides = split({f"{index}": b"text" for index in range(files)}, fraction)
    assert [len(side) for side in sides] == [files - held_out, held_out]


def test_join_puts_a_nul_between_texts() -> None:
    text_N = join({"a": b"ab", "b": b"c"})
    assert text_N.dtype == torch.uint8
    assert bytes(text_N.tolist()) == b"ab\0c"


def test_windows_cover_the_text() -> None:
    text_N = torch.arange(100, dtype=torch.uint8)
    windows = Windows(text_N, seq_len=11)
    targets_N = torch.cat([windows[index][1:] for index in range(len(windows))])
    assert torch.equal(targets_N, text_N[1:100])
    assert all(len(windows[index]) == 12 for index in range(len(windows)))
    with pytest.raises(IndexError):
        windows[len(windows)]


def test_counted_windows_are_spread_evenly() -> None:
    windows = Windows(torch.arange(101, dtype=torch.uint8), seq_len=10, count=5)
    assert [int(window[0]) for window in windows] == [0, 20, 40, 60, 80]
    assert len(Windows(torch.zeros(101, dtype=torch.uint8), seq_len=10, count=99)) == 10


def test_text_shorter_than_a_window() -> None:
    with pytest.raises(ValueError, match=r"10 bytes has no window of seq_len \+ 1 = 11"):
        Windows(torch.zeros(10, dtype=torch.uint8), seq_len=10)


# --------------------------------------------------------------------------------------- the model


def test_later_bytes_do_not_change_earlier_logits() -> None:
    model = ByteLM(TINY)
    bytes_BT = torch.randint(256, (2, 32))
    changed_BT = bytes_BT.clone()
    changed_BT[:, 20] = (changed_BT[:, 20] + 1) % 256
    before_BTV, after_BTV = model(bytes_BT), model(changed_BT)
    torch.testing.assert_close(after_BTV[:, :20], before_BTV[:, :20])
    assert not torch.allclose(after_BTV[:, 20:], before_BTV[:, 20:])


def test_rotary_products_depend_on_the_distance_only() -> None:
    q_K, k_K = torch.randn(2, 16)
    cos_TR, sin_TR = rotation(64, 16, torch.device("cpu"))
    q_TK, k_TK = (rotate(x_K.expand(64, 16), cos_TR, sin_TR) for x_K in (q_K, k_K))
    scores_TT = q_TK @ k_TK.T
    for distance in (-30, -1, 0, 1, 30):
        diagonal = scores_TT.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert scores_TT.diagonal(0)[0] != pytest.approx(scores_TT.diagonal(1)[0].item(), abs=1e-3)
    torch.testing.assert_close(q_TK.norm(dim=-1), q_K.norm().expand(64))


def test_attention_sees_the_order_of_earlier_bytes() -> None:
    attention, (cos_TR, sin_TR) = Attention(TINY), rotation(3, 16, torch.device("cpu"))
    x_BTD = torch.randn(1, 3, 32)
    last_BD = attention(x_BTD, cos_TR, sin_TR)[:, -1]
    swapped_BD = attention(x_BTD[:, [1, 0, 2]], cos_TR, sin_TR)[:, -1]
    assert not torch.allclose(last_BD, swapped_BD, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untrained_loss_is_that_of_a_guess(dtype: torch.dtype) -> None:
    engine = FakeEngine(ByteLM(ByteLMArgs(layers=2)).to(dtype))
    loss, stats = feed(engine, torch.randint(256, (4, 257), dtype=torch.uint8))
    assert loss.dtype == torch.float32
    assert loss.ndim == 0
    assert loss.item() == pytest.approx(math.log(256), abs=0.15)
    assert 0 <= stats["accuracy"] < 0.05


def test_bfloat16_stays_near_float32() -> None:
    model, bytes_BT = ByteLM(TINY), torch.randint(256, (2, 32))
    exact_BTV = model(bytes_BT)
    rounded_BTV = model.bfloat16()(bytes_BT)
    assert rounded_BTV.dtype == torch.bfloat16
    torch.testing.assert_close(rounded_BTV.float(), exact_BTV, atol=0.02, rtol=0.05)


def test_dropout_only_in_training() -> None:
    model = ByteLM(TINY.model_copy(update={"dropout": 0.5}))
    bytes_BT = torch.randint(256, (1, 32))
    assert not torch.equal(model(bytes_BT), model(bytes_BT))
    model.eval()
    assert torch.equal(model(bytes_BT), model(bytes_BT))


def test_it_learns(folder: Path) -> None:
    task = build(config(path=str(folder), seq_len=32, dim=32, layers=1, heads=2))
    model = task.models["lm"]
    assert isinstance(model, ByteLM)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch_BT = torch.stack([task.train_data[index] for index in range(8)])
    losses = []
    for _ in range(30):
        loss, _ = task.feeder(FakeEngine(model), batch_BT)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# --------------------------------------------------------------------------------------- the task


def test_every_parameter_gets_a_gradient(folder: Path) -> None:
    task = build(config(path=str(folder), seq_len=32, dim=32, layers=2, heads=2))
    batch_BT = task.eval_data[0][None] if task.eval_data else pytest.fail("no held-out data")
    model = task.models["lm"]
    assert isinstance(model, ByteLM)
    task.feeder(FakeEngine(model), batch_BT)[0].backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_a_single_file_is_not_held_out(tmp_path: Path) -> None:
    (tmp_path / "only.txt").write_text("text " * 100)
    assert build(config(path=str(tmp_path), seq_len=32, dim=8, heads=1)).eval_data is None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"depth": 3}, "depth"),
        ({"dim": 100, "heads": 3}, "dim = 100 is not divisible by heads = 3"),
        ({"dim": 12, "heads": 4}, "dim / heads = 3 is odd"),
        ({"dropout": 1.0}, "less than 1"),
    ],
)
def test_wrong_arguments(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        build(config(**args))
