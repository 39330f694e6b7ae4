"""Knowledge distillation: a small student of handwritten digits learns from a large frozen teacher.

Hinton et al., "Distilling the Knowledge in a Neural Network", 2015 (KL of softened distributions);
Ba and Caruana, "Do Deep Nets Really Need to be Deep?", 2014 (squared error of logits).

Tensor names end in their shape: B batch, P pixels (64), C classes (10).
"""

from functools import partial
from pathlib import Path
from typing import Any, Literal

import digits
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from harness import io
from harness.config import Config, Section
from harness.errors import ConfigError
from harness.task import Stats, Task

CLASSES = 10
TEACHER_STEPS = 100


class DistillArgs(Section):
    """[task] args = {...} of this task."""

    teacher_alpha: float = Field(default=0.5, ge=0, le=1)
    """Weight of the teacher in the loss; the rest is cross entropy with the true digits."""
    teacher_temperature: float = Field(default=2.0, gt=0)
    """Divides the logits before the KL divergence: a high one gives wrong digits more weight."""
    teacher_loss_fn: Literal["kl", "mse"] = "kl"
    """"kl": divergence of the teacher's distribution from the student's; "mse": squared error of
    the logits."""
    teacher_path: Path | None = None
    """Trained weights of the teacher, as a run exports them; None trains it first, in a second."""
    teacher_width: int = Field(default=256, ge=1)
    """Width of the teacher's hidden layer."""
    width: int = Field(default=16, ge=1)
    """Width of the student's hidden layer."""


def build(config: Config) -> Task:
    """The task of `config.task.args`, with the engines "student" and "teacher".

    Raises pydantic's ValidationError for wrong arguments, ConfigError for weights that do not match
    the teacher, and what `digits.read` raises.
    """
    args = DistillArgs.model_validate(config.task.args)
    train, held_out = digits.split(*digits.read())
    teacher, student = classifier(args.teacher_width), classifier(args.width)
    if args.teacher_path is None:
        teach(teacher, train.images_NP, train.digits_N)
    else:
        load(teacher, args.teacher_path)
    return Task(
        models={"student": student, "teacher": teacher},
        train_data=train,
        eval_data=held_out,
        feeder=partial(feed, args),
    )


def classifier(width: int) -> nn.Sequential:
    """Logits [B, C] of digits [B, P], through one hidden layer."""
    return nn.Sequential(nn.Linear(digits.PIXELS, width), nn.GELU(), nn.Linear(width, CLASSES))


def feed(args: DistillArgs, engine: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Stats]:
    """The student's loss on a batch of digits [B, P] and their classes [B].

    Returns it with its two parts, in nats (the teacher's with "mse": squared logits), and the
    fractions of digits on which the student is right, and on which it agrees with the teacher.
    """
    images_BP = batch[0].to(engine.device, engine.dtype)
    digits_B = batch[1].to(engine.device)
    with torch.no_grad(), engine.peers.lend("teacher") as teacher:
        teacher_BC = teacher(images_BP).float()
    student_BC = engine(images_BP).float()
    own = F.cross_entropy(student_BC, digits_B)
    distilled = teacher_loss(student_BC, teacher_BC, args.teacher_loss_fn, args.teacher_temperature)
    predicted_B = student_BC.detach().argmax(-1)
    stats = {
        "own_loss": own.detach(),
        "teacher_loss": distilled.detach(),
        "accuracy": (predicted_B == digits_B).float().mean(),
        "agreement": (predicted_B == teacher_BC.argmax(-1)).float().mean(),
    }
    return (1 - args.teacher_alpha) * own + args.teacher_alpha * distilled, stats


def teacher_loss(student_BC: Tensor, teacher_BC: Tensor, kind: str, temperature: float) -> Tensor:
    """How far the student's logits are from the teacher's.

    "kl" is KL(teacher || student) of the softened distributions, averaged over B, times the square
    of the temperature, which keeps its gradients as large at any temperature; "mse" takes none.
    """
    if kind == "mse":
        return F.mse_loss(student_BC, teacher_BC)
    student_BC = F.log_softmax(student_BC / temperature, dim=-1)
    teacher_BC = F.log_softmax(teacher_BC / temperature, dim=-1)
    divergence = F.kl_div(student_BC, teacher_BC, reduction="batchmean", log_target=True)
    return divergence * temperature**2


def teach(teacher: nn.Module, images_NP: Tensor, digits_N: Tensor) -> None:
    """Trains the teacher on all digits in one batch."""
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=2e-3)
    for _ in range(TEACHER_STEPS):
        optimizer.zero_grad()
        F.cross_entropy(teacher(images_NP), digits_N).backward()
        optimizer.step()


def load(teacher: nn.Module, path: Path) -> None:
    """Loads exported weights. Raises ConfigError if missing or not matching the teacher."""
    try:
        teacher.load_state_dict(io.load(path))
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"task.args.teacher_path: {path}: {error}") from None
