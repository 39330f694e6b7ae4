"""The tasks on handwritten digits learn, from the shipped configs.

test_engines.py holds them against plain PyTorch.
"""

import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import digits
import distill
import gan
import images
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from harness.config import Config
from harness.config.command_line import parse_args
from harness.config.sections import TaskConfig
from harness.errors import CommandError, ConfigError
from harness.io import load, save
from harness.run import run_in_world
from harness.testing.pool import RankPool
from tests.support.fake_digits import fake_digits, train_on_fake_digits
from tests.support.helpers import records

run = run_in_world if find_spec("sklearn") else train_on_fake_digits
"""On the real digits where scikit-learn is installed."""


def shipped(task: str, directory: Path, steps: int, *words: str) -> Config:
    """The task's own .toml, for some steps, evaluated before and after them."""
    words = (f"--run.steps={steps}", f"--trainer.eval_every={steps}", *words)
    own = (f"--run.dir={directory}", "--control.stdin=false", "--control.socket=false")
    return parse_args(["--config", f"launch/tasks/{task}.toml", *own, *words])


def test_the_gan_learns(two_ranks: RankPool, tmp_path: Path) -> None:
    config = shipped("gan", tmp_path, 150)
    two_ranks.run(run, config)
    first, last = records(config, "eval/")
    distance = "eval/G/energy_distance"
    assert last[distance] < 0.8 * first[distance]
    assert (config.run_dir / "exports/step-00000150/G.ema.sft").exists()


def test_the_images_are_learned(two_ranks: RankPool, tmp_path: Path) -> None:
    small = ("--task.args.channels=8", "--task.args.blocks=1", "--data.workers=0")
    config = shipped("images", tmp_path, 25, *small, "--engines.net.scheduler.warmup=2")
    two_ranks.run(run, config)
    first, last = records(config, "eval/")
    assert last["eval/accuracy"] > first["eval/accuracy"] + 0.3
    weights = load(config.run_dir / "exports/step-00000025/net.sft")
    assert weights["stem.1.num_batches_tracked"] == 25


def test_images_are_augmented_as_configured() -> None:
    image = torch.full((1, 8, 8), -1.0)
    image[0, 2:6, 3:5] = 1.0
    still = images.ImagesArgs(turn=0, scale=0, shift=0)
    assert torch.allclose(images.augmented(image, still), image, atol=1e-5)
    moved = images.augmented(image, images.ImagesArgs(turn=180, shift=3))
    assert not torch.allclose(moved, image, atol=0.5)
    assert moved.abs().max() <= 1 + 1e-5
    assert moved[0, 0, 0] == -1  # paper comes in from outside
    data = images.Images(digits.Digits(image.view(1, 64), torch.tensor([3])), images.ImagesArgs())
    assert not torch.equal(data[0][0], data[0][0])
    assert torch.equal(images.Images(data.data)[0][0], image)


@pytest.mark.parametrize("loss_fn", ["kl", pytest.param("mse", marks=pytest.mark.slow)])
def test_the_student_learns(two_ranks: RankPool, tmp_path: Path, loss_fn: str) -> None:
    config = shipped("distill", tmp_path, 60, f"--task.args.teacher_loss_fn={loss_fn}")
    two_ranks.run(run, config)
    first, last = records(config, "eval/")
    for what in ("loss", "own_loss", "teacher_loss"):
        assert last[f"eval/student/{what}"] < 0.8 * first[f"eval/student/{what}"]
    assert last["eval/student/agreement"] > first["eval/student/agreement"] + 0.1


def logits(seed: int) -> Tensor:
    return torch.randn(5, 10, generator=torch.Generator().manual_seed(seed))


def test_the_teachers_losses_are_those_of_the_papers() -> None:
    student, teacher = logits(0), logits(1)
    p, q = F.softmax(teacher / 3, -1), F.softmax(student / 3, -1)
    divergence = 9 * (p * (p / q).log()).sum(-1).mean()
    assert distill.teacher_loss(student, teacher, "kl", 3.0) == pytest.approx(divergence.item())
    squares = (student - teacher).square().mean()
    assert distill.teacher_loss(student, teacher, "mse", 3.0) == pytest.approx(squares.item())
    for kind in ("kl", "mse"):
        assert abs(distill.teacher_loss(student, student, kind, 3.0)) < 1e-6


def test_the_energy_distance_is_that_of_two_samples() -> None:
    """By its definition, with all held-out points at once."""
    real, made = logits(0), logits(1)
    across = torch.stack([(a - b).norm() for a in real for b in made]).mean()
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    within = [torch.stack([(x[i] - x[j]).norm() for i, j in pairs]).mean() for x in (real, made)]

    class Engine:
        name, device, dtype = "G", torch.device("cpu"), torch.float32

        def __call__(self, noise: Tensor) -> Tensor:
            return made

    found = gan.evaluate(3, gan.spread(real), Engine(), (real, real))["energy_distance"]
    assert found == pytest.approx(float(2 * across - sum(within)), abs=1e-5)


def test_a_sample_is_drawn() -> None:
    class Engine:
        device, dtype = torch.device("cpu"), torch.float32
        averaged = staticmethod(nullcontext)

        def __call__(self, noise: Tensor) -> Tensor:
            return torch.linspace(-1, 1, 64).expand(len(noise), -1)

    rows = gan.sample(3, {"G": Engine()}, "2").splitlines()[1:]
    assert len(rows) == 8 and all(len(row) == 2 * 16 + 2 for row in rows)
    assert rows[0].startswith("    ") and rows[7].endswith("@@")
    for wrong in ("0", "13", "x"):
        with pytest.raises(CommandError, match="expected an integer from 1 to 12"):
            gan.sample(3, {"G": Engine()}, wrong)


def config_with(**args: object) -> Config:
    return Config.model_construct(task=TaskConfig.model_construct(args=args))


def test_a_teacher_comes_from_an_export(tmp_path: Path) -> None:
    path = tmp_path / "teacher.sft"
    with patch.object(digits, "read", fake_digits):
        teacher = distill.build(config_with(teacher_width=8)).models["teacher"]
        save(teacher.state_dict(), path)
        again = distill.build(config_with(teacher_width=8, teacher_path=path)).models["teacher"]
        for name, tensor in teacher.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor)
        with pytest.raises(ConfigError, match=r"teacher_path: .*teacher.sft(?s:.*)size mismatch"):
            distill.build(config_with(teacher_width=9, teacher_path=path))
        with pytest.raises(ConfigError, match=r"teacher_path: .*none.sft"):
            distill.build(config_with(teacher_path=tmp_path / "none.sft"))


def test_without_scikit_learn_the_error_names_the_package() -> None:
    with (
        patch.dict(sys.modules, {"sklearn.datasets": None}),
        pytest.raises(ConfigError, match="pip install scikit-learn"),
    ):
        digits.read()
