"""Several engines in one loop, at every ZeRO stage, against plain PyTorch."""

import re
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import digits
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from harness.config import Config
from harness.config.sections import merge
from harness.convert.run_checkpoints import checkpoints_in
from harness.engine.build import build_engines
from harness.engine.turns import Turn
from harness.errors import TaskError
from harness.run import run_in_world
from harness.task import load_task
from harness.testing.faults import fail_at
from harness.testing.pool import RankError, RankPool
from harness.zero import fetches
from harness.zero.reader import SavedEngine
from tests.support.commanded import commanded
from tests.support.fake_digits import fake_digits, train_on_fake_digits
from tests.support.helpers import (
    ROOT,
    assert_same_optimizer,
    checkpoint,
    error_of,
    exported,
    records,
    tensor_crcs,
    tiny_config,
    without_times,
)
from tests.support.plain_engines import plain_loop
from tests.support.quick import quick
from tests.support.small_loop import engines_of, train

STAGES = [0, 1, 2, 3]


def config_of(directory: Path, path: str, engines: dict[str, Any], **overrides: Any) -> Config:
    """A run of some steps with these engines and AdamW for those that are trained."""
    optimizer = {"name": "adamw", "lr": 1e-3, "betas": [0.5, 0.99], "weight_decay": 0.1}
    for settings in engines.values():
        settings["ds_config"] = ROOT / f"ds_configs/zero{settings.pop('stage')}.json"
        if settings.get("role") != "teacher":
            settings.setdefault("optimizer", optimizer)
    table = tiny_config(directory).model_dump()
    table |= {"engines": engines, "task": {"path": str(ROOT / path), "args": {}}}
    return Config.model_validate(merge(table, {"run": {"steps": 10}} | overrides))


def compare(config: Config, expected: list[dict[str, float]], models: dict[str, nn.Module]) -> None:
    """Compares losses and exported weights: `models` by the stem of their file."""
    for record, losses in zip(records(config), expected, strict=True):
        found = {k.partition("/")[0]: v for k, v in record.items() if k.endswith("/loss")}
        assert found == pytest.approx(losses, abs=1e-6, rel=1e-6)
    for name, model in models.items():
        torch.testing.assert_close(
            exported(config, file=f"{name}.sft"), dict(model.state_dict()), atol=1e-6, rtol=0
        )


# ------------------------------------------------------------------------------ a loss through both


@pytest.mark.parametrize("stage", quick(STAGES, 3))
def test_a_gan_and_its_average_equal_plain_torch(
    two_ranks: RankPool, tmp_path: Path, stage: int
) -> None:
    engines = {"D": {"stage": stage}, "G": {"stage": stage, "ema_decay": 0.8}}
    config = config_of(tmp_path, "launch/tasks/gan.py", engines, trainer={"eval_every": 3})
    two_ranks.run(train_on_fake_digits, config)
    with patch.object(digits, "read", fake_digits):
        expected, plain = plain_loop(config, world_size=2)
        task = load_task(config)
    average = plain["G"].average.module
    models = {name: engine.module for name, engine in plain.items()} | {"G.ema": average}
    compare(config, expected, models)
    assert task.eval_data is not None and task.evaluate is not None
    plain["G"].module = average
    with torch.no_grad():
        found = task.evaluate(plain["G"], task.eval_data[:])["energy_distance"]
    recorded = records(config, "eval/")[-1]["eval/G/energy_distance"]
    assert recorded == pytest.approx(float(found), abs=1e-5)


@pytest.mark.parametrize(
    ("stage", "accumulation"), quick([(0, 2), (1, 1), (2, 2), (3, 2)], (1, 1), (3, 2))
)
def test_a_gradient_penalty_equals_plain_torch(
    two_ranks: RankPool, tmp_path: Path, stage: int, accumulation: int
) -> None:
    """WGAN-GP: the critic is trained five times as often."""
    ds = {"gradient_accumulation_steps": accumulation}
    engines = {
        "D": {"stage": stage, "ds_overrides": ds},
        "G": {"stage": stage, "train_every": 5, "ds_overrides": ds},
    }
    config = config_of(tmp_path, "tests/tasks/wgan_task.py", engines)
    two_ranks.run(run_in_world, config)
    expected, plain = plain_loop(config, world_size=2)
    assert ["G" in losses for losses in expected].count(True) == 2
    compare(config, expected, {name: engine.module for name, engine in plain.items()})


def back_propagating(engine: Any, batch: Any) -> Any:
    loss = engine(batch).square().mean()
    loss.backward()
    return engine(batch).mean(), {}


def back_propagated(stage: int) -> str:
    engines = engines_of(nn.Linear(6, 3), back_propagating, stage)
    with pytest.raises(TaskError) as error:
        train(engines, [torch.ones(4, 6)])
    engines.close()
    return str(error.value)


@pytest.mark.parametrize("stage", STAGES)
def test_a_backward_in_the_feeder_is_refused(two_ranks: RankPool, stage: int) -> None:
    for error in two_ranks.run(back_propagated, stage):
        assert "a loss was back-propagated in the feeder" in error


def feed_constant(engine: Any, batch: Any) -> Any:
    return engine(batch).sum().detach(), {}


def feed_frozen(engine: Any, batch: Any) -> Any:
    engine.module.bias.requires_grad_(False)
    return engine(batch).sum(), {}


def feed_all_weights(engine: Any, batch: Any) -> Any:
    return engine(batch).sum() + engine.module.weight.square().sum(), {}


WRONG_FEEDERS: dict[Any, str] = {
    feed_constant: "the loss does not depend on any trained parameter",
    feed_frozen: "engine 'net': requires_grad was changed during the run: bias",
    feed_all_weights: "a penalty on all of them.* engines.net.unused_parameters",
}


def error_with(feeder: Any) -> str:
    """The error of a step at ZeRO 3, and its notes."""
    engines = engines_of(nn.Linear(6, 3), feeder, 3)
    with pytest.raises((TaskError, RuntimeError)) as error:
        train(engines, [torch.ones(4, 6)])
    assert error.type is TaskError or feeder is feed_all_weights
    engines.close()
    return " ".join([str(error.value), *getattr(error.value, "__notes__", ())])


def test_what_a_feeder_cannot_do_is_an_error_with_the_remedy(two_ranks: RankPool) -> None:
    for feeder, message in WRONG_FEEDERS.items():
        for error in two_ranks.run(error_with, feeder):
            assert re.search(message, error)


def edit_a_teacher() -> str:
    models: Any = {"net": nn.Linear(2, 2), "teacher": nn.Linear(2, 2)}
    engines = engines_of(models, feed_constant, 0)
    engines["teacher"].role = "teacher"
    with pytest.raises(TaskError) as error, engines["teacher"].edit_weights():
        pass
    engines.close()
    return str(error.value)


def test_the_weights_of_a_teacher_are_not_edited(two_ranks: RankPool) -> None:
    """They are in no checkpoint."""
    for error in two_ranks.run(edit_a_teacher):
        assert "engine 'teacher': the weights of a teacher were edited" in error


@pytest.mark.parametrize(("stages", "loss_fn"), [((3, 0), "kl"), ((1, 3), "mse")], ids=str)
def test_distillation_equals_plain_torch(
    two_ranks: RankPool, tmp_path: Path, stages: tuple[int, int], loss_fn: str
) -> None:
    engines = {"student": {"stage": stages[0]}, "teacher": {"stage": stages[1], "role": "teacher"}}
    args = {"teacher_loss_fn": loss_fn, "teacher_alpha": 0.7}
    config = config_of(tmp_path, "launch/tasks/distill.py", engines, task={"args": args})
    two_ranks.run(train_on_fake_digits, config)
    with patch.object(digits, "read", fake_digits):
        expected, plain = plain_loop(config, world_size=2)
    compare(config, expected, {"student": plain["student"].module})


@pytest.mark.parametrize(("stages", "way"), [((0, 2), "lend"), ((3, 1), "lend a part")], ids=str)
def test_engines_with_their_own_stage_accumulation_and_frequency(
    two_ranks: RankPool, tmp_path: Path, stages: tuple[int, int], way: str
) -> None:
    twice = {"gradient_accumulation_steps": 2}
    engines = {
        "D": {"stage": stages[0], "ds_overrides": twice},
        "G": {"stage": stages[1], "train_every": 3},
    }
    config = config_of(
        tmp_path, "tests/tasks/engines_task.py", engines, task={"args": {"way": way}}
    )
    two_ranks.run(run_in_world, config)
    expected, plain = plain_loop(config, world_size=2)
    assert ["G" in losses for losses in expected] == [step % 3 == 0 for step in range(1, 11)]
    compare(config, expected, {name: engine.module for name, engine in plain.items()})


@pytest.mark.parametrize("stage", quick(STAGES, 0, 3))
def test_what_is_lent_stays_frozen_while_the_backward_recomputes_it(
    two_ranks: RankPool, tmp_path: Path, stage: int
) -> None:
    engines = {"D": {"stage": stage}, "G": {"stage": stage}}
    args = {"reentrant": True}
    config = config_of(tmp_path, "tests/tasks/engines_task.py", engines, task={"args": args})
    two_ranks.run(run_in_world, config)
    expected, plain = plain_loop(config, world_size=2)
    compare(config, expected, {name: engine.module for name, engine in plain.items()})


def weights_left_of_a_loan(config: Config) -> list[str]:
    """Those of D that are still complete after a step of G."""
    engines = build_engines(load_task(config), config)
    engines.train()
    engines.step((torch.randn(4, 6),))
    weights = engines["D"].module.named_parameters()
    left = [name for name, weight in weights if not fetches.is_missing(weight)]
    engines.close()
    return left


@pytest.mark.parametrize("role", ["train", "teacher"])
def test_a_model_that_is_lent_and_called_again_is_sharded_afterwards(
    two_ranks: RankPool, tmp_path: Path, role: str
) -> None:
    overrides = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    engines = {"D": {"stage": 3, "role": role, "ds_overrides": overrides}, "G": {"stage": 3}}
    args = {"way": "lend twice"}
    config = config_of(tmp_path, "tests/tasks/engines_task.py", engines, task={"args": args})
    assert two_ranks.run(weights_left_of_a_loan, config) == [[], []]


LEND = re.escape("with engine.peers.lend('D') as model")
REFUSED = {
    "engine": f"engine 'D' was called in the turn of engine 'G'.*{LEND}",
    "engine, lent": f"engine 'D' was called in the turn of engine 'G'.*{LEND}",
    "module": f"the loss of engine 'G' would give a gradient to '.*' of engine 'D'.*{LEND}",
    "part of the module": "the loss of engine 'G' would give a gradient to '0.(weight|bias)'",
    "after the loan": "the loss of engine 'G' would give a gradient to '.*' of engine 'D'",
    "backward": "engine 'D' was back-propagated in the turn of engine 'G'",
    "itself": "engine 'G' cannot be lent in its own turn",
    "E": r"no engine 'E' to lend.*; the engines are D, G",
}


AT_EVERY_STAGE = ["engine", "module"]
WRONG = [(way, stage) for way in AT_EVERY_STAGE for stage in STAGES] + [
    (way, 1 + 2 * (number % 2)) for number, way in enumerate(REFUSED) if way not in AT_EVERY_STAGE
]


@pytest.mark.parametrize(("way", "stage"), WRONG)
def test_incorrect_use_is_an_error_with_the_remedy(
    two_ranks: RankPool, tmp_path: Path, way: str, stage: int
) -> None:
    engines = {"D": {"stage": stage}, "G": {"stage": stage}}
    config = config_of(
        tmp_path, "tests/tasks/engines_task.py", engines, task={"args": {"way": way}}
    )
    for error in two_ranks.run(error_of, config):
        assert re.search(REFUSED[way], error, re.DOTALL), error


@pytest.mark.parametrize("way", ["block", "turn", "broken turn"])
def test_a_lent_engine_is_restored(way: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Linear(2, 2)).requires_grad_(False)
    model[2].requires_grad_(True)
    model[1].eval()
    state = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    turn = Turn()
    with suppress(ZeroDivisionError), turn.of("G") if "turn" in way else nullcontext():
        with turn.lend("D", model) as lent, turn.lend("D", model) as again:
            assert lent is again is model
            model.eval()
        assert any(p.requires_grad for p in model.parameters()) == (way == "block")
        if way == "broken turn":
            _ = 1 / 0
    turn.check("D", "called")
    assert state == (
        [p.requires_grad for p in model.parameters()],
        [m.training for m in model.modules()],
    )


def test_a_parameter_of_two_engines_is_refused(two_ranks: RankPool, tmp_path: Path) -> None:
    engines = {"D": {"stage": 1}, "G": {"stage": 1}}
    config = config_of(
        tmp_path, "tests/tasks/engines_task.py", engines, task={"args": {"shared": True}}
    )
    for error in two_ranks.run(error_of, config):
        assert "the models 'D' and 'G' share the parameter '0.weight'" in error


@pytest.mark.parametrize(
    ("engines", "message"),
    [
        (
            {"net": {"train_every": 2}},
            "train_every = {'net': 2}: at least one must be trained at every step",
        ),
        ({"net": {}, "slow": {"train_every": 7}}, "train_every = 7: expected at most run.steps ="),
        ({"net": {"train_every": 0}}, "greater than or equal to 1"),
        ({"net": {"ema_decay": 1.0}}, "less than 1"),
        ({"net": {}, "wise": {"role": "teacher", "ema_decay": 0.9}}, "a teacher is not trained"),
    ],
)
def test_impossible_settings_are_refused(
    tmp_path: Path, engines: dict[str, Any], message: str
) -> None:
    known = tiny_config(tmp_path).model_dump()
    trained = known["engines"]["net"]
    taught = {"ds_config": trained["ds_config"]}
    tables = {
        name: (taught if "role" in settings else trained) | settings
        for name, settings in engines.items()
    }
    with pytest.raises(ValidationError, match=re.escape(message)):
        Config.model_validate(known | {"engines": tables})


# ------------------------------------------------------------------------------------ resuming


def train_and_die(config: Config, step: int) -> None:
    with fail_at("manifest", step=step):
        train_on_fake_digits(config)


@pytest.mark.parametrize("stages", [(3, 1)], ids=str)
def test_a_gan_that_is_killed_resumes_to_the_bit(
    two_ranks: RankPool, tmp_path: Path, stages: tuple[int, int]
) -> None:
    def config(name: str) -> Config:
        engines = {
            "D": {"stage": stages[0], "ema_decay": 0.9},
            "G": {"stage": stages[1], "train_every": 2, "scheduler": {"name": "cosine"}},
        }
        trainer = {"save_every": 3, "eval_every": 4}
        run = {"steps": 12, "name": name}
        return config_of(tmp_path, "launch/tasks/gan.py", engines, trainer=trainer, run=run)

    full, killed = config("full"), config("killed")
    two_ranks.run(train_on_fake_digits, full)
    with pytest.raises(RankError, match="died with exit code -9"):
        two_ranks.run(train_and_die, killed, 9)
    assert "00000006" in checkpoints_in(killed.run_dir / "checkpoints")[0].name
    two_ranks.run(train_on_fake_digits, killed)
    for prefix in ("", "eval/"):
        assert without_times(records(killed, prefix)) == without_times(records(full, prefix))
    one, two = (checkpoint(run, 12) for run in (full, killed))
    assert tensor_crcs(one / "rank-00001.pt") == tensor_crcs(two / "rank-00001.pt")
    for name in killed.engines:
        resumed = SavedEngine(two / name)
        assert_same_optimizer(resumed, SavedEngine(one / name))
        assert {"ema" in resumed.state_keys(n) for n in resumed.shapes} == {name == "D"}


def test_a_command_can_apply_to_one_engine(two_ranks: RankPool, tmp_path: Path) -> None:
    engines = {"D": {"stage": 2}, "G": {"stage": 3, "train_every": 2}}
    config = config_of(tmp_path, "tests/tasks/engines_task.py", engines, control={"stdin": True})
    two_ranks.run(commanded, config, "lr G 1e-4@3\nclip D 0.5@4\n")
    found = records(config)
    assert [record["D/lr"] for record in found] == [1e-3] * 10
    rates = [record.get("G/lr") for record in found]
    assert rates == [None, 1e-3, None, 1e-4, None, 1e-4, None, 1e-4, None, 1e-4]
    assert [record["samples"] for record in found] == [8 * step for step in range(1, 11)]
