"""`Task.weigh`: the gradient is that of one process over all terms, however they are batched."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.config import Config
from harness.run import run_in_world
from tests.support.helpers import Pools, error_of, exported, log_text, losses, records, tiny_config
from tests.tasks.tokens_task import Model, Texts, mean_loss, pad

TASK = str(Path(__file__).parent / "tasks/tokens_task.py")
STEPS, TEXTS_A_STEP, RATE = 6, 16, 0.5


def config_of(directory: Path, ranks: int, accumulation: int, stage: int, **args: Any) -> Config:
    overrides = {
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage3_param_persistence_threshold": 0},
    }
    optimizer = {"name": "torch.optim:SGD", "lr": RATE, "weight_decay": 0.0}
    engine = {"ds_overrides": overrides, "optimizer": optimizer}
    size = TEXTS_A_STEP // (ranks * accumulation)
    return tiny_config(
        directory,
        stage,
        run={"steps": STEPS},
        task={"path": TASK, "args": args},
        engines={"net": engine},
        data={"micro_batch_size": size, "sampler": "ordered"},
    )


def plain(empty: list[int]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final weights of one process that takes all texts of a step at once. A step
    without a term is skipped."""
    torch.manual_seed(0)
    model, texts = Model(), Texts(64, 1, empty, noise=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    found = []
    for step in range(STEPS):
        ids = pad([texts[(step * TEXTS_A_STEP + k) % 64] for k in range(TEXTS_A_STEP)])
        loss = mean_loss(model(ids[:, :-1].clamp(min=0)), ids)
        if loss.isfinite():
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            found.append(loss.item())
    return found, model.state_dict()


LAYOUTS = [(r, a, s) for r in (1, 2, 4) for a in (1, 4) for s in (0, 1, 2, 3)]
QUICK = {(1, 4, 3), (2, 1, 0), (2, 4, 1), (2, 4, 3), (4, 1, 2)}


@pytest.mark.parametrize(
    ("ranks", "accumulation", "stage"),
    [pytest.param(*k, marks=() if k in QUICK else pytest.mark.slow) for k in LAYOUTS],
)
def test_the_gradient_is_the_mean_over_all_terms(
    pools: Pools, tmp_path: Path, ranks: int, accumulation: int, stage: int
) -> None:
    """Also with texts without any term: a micro-batch of them has the loss 0 / 0."""
    empty = [3, 5, 6, 17, 18]
    config = config_of(tmp_path, ranks, accumulation, stage, empty=empty)
    pools(ranks).run(run_in_world, config)
    expected, weights = plain(empty)
    assert losses(config) == pytest.approx(expected, abs=1e-6)
    for name, tensor in exported(config).items():
        assert torch.allclose(tensor, weights[name], rtol=0, atol=1e-6), name


@pytest.mark.parametrize("stage", [0, 3])
def test_a_step_without_any_term_is_skipped_on_all_ranks(
    pools: Pools, tmp_path: Path, stage: int
) -> None:
    empty = list(range(16, 32))
    config = config_of(tmp_path, 2, 4, stage, empty=empty)
    pools(2).run(run_in_world, config)
    expected, weights = plain(empty)
    assert len(expected) == STEPS - 2  # after four steps the texts begin again
    assert [r["loss"] for r in records(config) if "loss" in r] == pytest.approx(expected, abs=1e-6)
    assert [r["step"] for r in records(config) if "loss" not in r] == [2, 6]
    assert "step 2: engine net: skipped, as no rank has a term (1 so far)" in log_text(config)
    assert [r["skipped"] for r in records(config)] == [0, 1, 1, 1, 1, 2]
    for name, tensor in exported(config).items():
        assert torch.allclose(tensor, weights[name], rtol=0, atol=1e-6), name


@pytest.mark.parametrize("loader", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_it_resumes_to_the_bit(pools: Pools, tmp_path: Path, loader: bool, workers: int) -> None:
    """Batches that were fetched ahead are fetched again, with the same random noise."""

    def config(name: str, steps: int) -> Config:
        made = config_of(tmp_path / name, 2, 2, 1, noise=True, loader=loader)
        data = made.data.model_copy(update={"workers": workers})
        return made.model_copy(
            update={"run": made.run.model_copy(update={"steps": steps}), "data": data}
        )

    pools(2).run(run_in_world, config("whole", 6))
    pools(2).run(run_in_world, config("parts", 3))
    pools(2).run(run_in_world, config("parts", 6))
    assert losses(config("parts", 6)) == losses(config("whole", 6))
    assert len(set(losses(config("whole", 6)))) == 6


def test_a_weight_is_a_finite_number(tmp_path: Path, pools: Pools) -> None:
    for weight in (math.nan, -1.0, math.inf):
        config = config_of(tmp_path, 1, 1, 0, weigh=str(weight))
        (error,) = pools(1).run(error_of, config)
        assert f"Task.weigh returned {weight}, expected a finite number >= 0" in error
