"""Schedules: their shapes, what they are given, and that they resume to the bit."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness.config import Config
from harness.config.engine_sections import SchedulerConfig
from harness.control.commands import Quit
from harness.errors import ConfigError
from harness.optim.plateau import Plateau
from harness.optim.scheduler import Schedule
from harness.run import run_in_world
from harness.testing.pool import RankError, RankPool
from harness.trainer import Trainer
from tests.support.commanded import commanded
from tests.support.helpers import (
    checkpoint,
    log_text,
    records,
    tiny_config,
    without_times,
)


def schedule(name: str, steps: int = 100, **args: Any) -> Schedule:
    return Schedule(SchedulerConfig.model_validate({"name": name, **args}), steps)


def factors(name: str, steps: int = 100, **args: Any) -> list[float]:
    return list(map(schedule(name, steps, **args), range(steps + 1)))


# ------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "one-cycle", "noam"])
def test_warmup_is_steps_or_a_ratio_of_all_steps(name: str) -> None:
    expected = factors(name, 200, warmup=20)
    assert factors(name, 200, warmup=0.1) == expected
    assert factors(name, 200, warmup=20.0) == expected  # as configs of before may have it
    assert factors(name, 200, warmup=0.001) == factors(name, 200, warmup=1)  # at least a step


def test_a_ratio_follows_the_last_step() -> None:
    spanned = schedule("cosine", 100, warmup=0.1)
    spanned.span(300)
    assert list(map(spanned, range(301))) == factors("cosine", 300, warmup=30)
    assert factors("warmup-stable-decay", 200, decay=0.25) == factors(
        "warmup-stable-decay", 200, decay=50
    )


def staircase(total_steps: int, *, stairs: int = 2) -> Callable[[int], float]:
    """A schedule of a user's own."""
    return lambda step: 0.5 ** (step * stairs // total_steps)


def broken(total_steps: int, kind: str) -> Any:
    """Schedules that are none."""
    if kind == "raises":
        raise ValueError("no idea")
    return {"text": "half", "nan": lambda step: math.nan, "negative": lambda step: -1.0}[kind]


OWN = f"{__name__}:"


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("cosine", {"warmup": 2.5}, "warmup = 2.5, expected whole steps, or a ratio"),
        ("cosine", {"warmup": -1}, "warmup = -1, expected whole steps"),
        ("cosine", {"warmup": True}, "warmup = True, expected whole steps"),
        ("cosine", {"warmup": "10%"}, "warmup = '10%', expected whole steps"),
        ("cosine", {"floor": math.inf}, "floor = inf, expected a number >= 0"),
        ("cosine", {"warmpu": 3}, "unknown key 'warmpu' (did you mean 'warmup'?)"),
        ("cosine-with-restarts", {"cycles": 0}, "cycles = 0, expected a whole number >= 1"),
        ("cosine-with-restarts", {"cycles": 1.5}, "cycles = 1.5, expected a whole number >= 1"),
        ("plateau", {"mode": "low"}, "mode = 'low', expected 'min' or 'max'"),
        ("plateau", {"metric": 3}, "metric = 3, expected a text"),
        ("plateau", {"factor": 1.5}, "factor = 1.5, expected a number below 1"),
        ("cosin", {}, "scheduler 'cosin' is unknown (did you mean 'cosine'?)"),
        ("no_such_module:x", {}, "No module named 'no_such_module'"),
        (OWN + "staircase", {"stair": 3}, "unknown key 'stair' (did you mean 'stairs'?)"),
        (OWN + "OWN", {}, "is not a function"),
        (OWN + "broken", {"kind": "raises"}, "no idea"),
        (OWN + "broken", {"kind": "text"}, "returned 'half', expected a function of the step"),
        (OWN + "broken", {"kind": "nan"}, "the factor at step 0 is nan, expected a number >= 0"),
        (OWN + "broken", {"kind": "negative"}, "the factor at step 0 is -1.0"),
    ],
)
def test_wrong_arguments_are_config_errors(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        schedule(name, **args)
    assert message in str(error.value)


# ------------------------------------------------------------------------------------ shapes


def test_restarts_are_cosines_end_to_end() -> None:
    found = factors("cosine-with-restarts", 110, warmup=10, cycles=4, decay=0.5, floor=0.1)
    assert found[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    for cycle in range(4):
        peak, start = 0.5**cycle, 10 + 25 * cycle
        for step in range(25):
            wave = (1 + math.cos(math.pi * step / 25)) / 2
            assert found[start + step] == pytest.approx(0.1 + (peak - 0.1) * wave)
    assert found[110] == pytest.approx(0.1)
    assert factors("cosine-with-restarts", 90, cycles=1) == pytest.approx(factors("cosine", 90))
    torchs = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), T_0=25
    )
    for ours in factors("cosine-with-restarts", 100, cycles=4)[:100]:
        assert ours == pytest.approx(torchs.get_last_lr()[0])
        torchs.step()


def test_inverse_sqrt_decays_whatever_the_last_step_is() -> None:
    found = factors("inverse-sqrt", 100, warmup=10)
    assert found[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert (found[10], found[20], found[90]) == pytest.approx((1.0, math.sqrt(1 / 2), 1 / 3))
    assert factors("inverse-sqrt", 50, warmup=10) == found[:51]
    assert factors("inverse-sqrt", timescale=25)[75] == pytest.approx(0.5)
    assert factors("inverse-sqrt", 10)[10] == pytest.approx(1 / math.sqrt(1.001))


def test_an_import_path_is_a_schedule() -> None:
    assert factors(OWN + "staircase", 4, stairs=4) == [1.0, 0.5, 0.25, 0.125, 0.0625]


@pytest.mark.parametrize("mode", ["min", "max"])
def test_plateau_is_torchs(mode: Any) -> None:
    """Torch reduces after more than `patience` bad evaluations, harness after that many."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    torchs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode=mode, factor=0.5, patience=2, threshold=0.01, min_lr=0.1
    )
    ours = Plateau(
        100, metric="eval/x", mode=mode, factor=0.5, patience=3, threshold=0.01, floor=0.1
    )
    values = [3.0, 2.0, 2.0, 1.999, 2.5, 1.5, 1.5, math.nan, 1.5, 1.5, 1.4, *[1.4] * 20]
    found = []
    for step, value in enumerate(values if mode == "min" else [5 - value for value in values]):
        torchs.step(value)
        assert ours.evaluated(step, {"eval/x": value})
        assert not ours.evaluated(step, {"eval/x": value})  # a step counts once
        found.append(ours(step))
        assert found[-1] == optimizer.param_groups[0]["lr"], step
    assert found[4] == 0.5 and found[-1] == 0.1


def test_plateau_improves_on_negative_numbers_too() -> None:
    plateau = Plateau(100, factor=0.5, patience=1, threshold=0.1)
    for step, (value, factor) in enumerate([(-10.0, 1), (-10.5, 0.5), (-12.0, 0.5), (-9.0, 0.25)]):
        plateau.evaluated(step, {"eval/loss": value})
        assert plateau(step) == factor


def test_plateau_names_the_metrics_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"'loss' is not in the evaluation.*mean 'eval/loss'"):
        Plateau(100, metric="loss").evaluated(1, {"eval/loss": 1.0, "eval/accuracy": 0.5})


# ------------------------------------------------------------------------------------ runs

PLATEAU = {"name": "plateau", "warmup": 0.25, "factor": 0.5, "patience": 1, "threshold": 0.2}
"""No evaluation of the tiny run improves by 20 %, except on nothing."""


def run_of(directory: Path, scheduler: dict[str, Any], steps: int, **overrides: Any) -> Config:
    engine = {"scheduler": scheduler}
    trainer = {"eval_every": 2, "save_every": 3, "export_at_end": False}
    return tiny_config(
        directory,
        1,
        engines={"net": engine},
        trainer=trainer,
        run={"steps": steps},
        **overrides,
    )


SCHEDULES: dict[str, dict[str, Any]] = {
    "restarts": {"name": "cosine-with-restarts", "warmup": 0.2, "cycles": 3, "decay": 0.5},
    "inverse-sqrt": {"name": "inverse-sqrt", "warmup": 3},
    "plateau": PLATEAU,
    "import path": {"name": OWN + "staircase", "stairs": 3},
}


@pytest.mark.parametrize(
    "name",
    ["restarts", "plateau"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("inverse-sqrt", "import path")],
)
def test_a_resumed_run_is_the_same_and_set_steps_spans(
    two_ranks: RankPool, tmp_path: Path, name: str
) -> None:
    """Resumed after step 6 of 12; or begun with 8, and extended at the first step."""
    whole, parts = (run_of(tmp_path / kind, SCHEDULES[name], 12) for kind in ("whole", "parts"))
    two_ranks.run(run_in_world, whole)
    shutil.copytree(checkpoint(whole, 6), checkpoint(parts, 6))
    two_ranks.run(run_in_world, parts)
    for prefix in ("", "eval/"):
        expected = [record for record in records(whole, prefix) if record["step"] > 6]
        assert without_times(records(parts, prefix)) == without_times(expected)
    rates = [record["lr"] for record in records(whole)]
    assert len(set(rates)) > 2
    short = run_of(tmp_path / "short", SCHEDULES[name], 8, control={"stdin": True})
    two_ranks.run(commanded, short, "steps 12@1\n")
    assert [record["lr"] for record in records(short)][1:] == rates[1:]


def test_plateau_lowers_a_run_s_rate_and_obeys_commands(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    """Evaluations at 0, 2, 4, ...; one on command at step 3 does not count."""
    config = run_of(
        tmp_path, PLATEAU | {"warmup": 0, "threshold": 9.0}, 10, control={"stdin": True}
    )
    two_ranks.run(commanded, config, "eval@3\neval@4\nlr 1e-3@6\nlr auto@7\nlr x0.1@8\n")
    rates = [record["lr"] for record in records(config)]
    expected = [1e-2, 1e-2, 5e-3, 5e-3, 2.5e-3, 2.5e-3, 1e-3, 1.25e-3, 6.25e-5, 6.25e-5]
    assert rates == pytest.approx(expected)
    assert "step 2: eval/loss has not improved on" in log_text(config)


def ended_in_the_evaluation(config: Config, step: int) -> None:
    """A run that is ended by a command while it evaluates at a step."""
    with pytest.MonkeyPatch.context() as patch:
        evaluate = Trainer.evaluate

        def or_end(self: Trainer) -> str | None:
            if self.engines.global_step != step:
                return evaluate(self)
            self.ending = Quit()
            return None

        patch.setattr(Trainer, "evaluate", or_end)
        run_in_world(config)


def test_plateau_catches_up_with_an_evaluation_that_was_not_finished(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    config, whole = (run_of(tmp_path / name, PLATEAU, 8) for name in "ab")
    two_ranks.run(ended_in_the_evaluation, config, 4)
    assert len(records(config)) == 4
    for run in (config, whole):
        two_ranks.run(run_in_world, run)
    for prefix in ("", "eval/"):
        found, expected = (without_times(records(run, prefix)) for run in (config, whole))
        assert found == expected


def test_plateau_without_its_metric_ends_before_step_1(two_ranks: RankPool, tmp_path: Path) -> None:
    config = run_of(tmp_path, PLATEAU | {"metric": "eval/lost"}, 4)
    with pytest.raises(RankError, match=r"'eval/lost' is not in the evaluation .did you mean"):
        two_ranks.run(run_in_world, config)
    assert not records(config)


def test_plateau_needs_evaluations(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"engines.net.scheduler: 'plateau' needs .*eval_every"):
        tiny_config(tmp_path, engines={"net": {"scheduler": PLATEAU}})
