"""A model that has changed since the save is one message, before anything is loaded."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness.checkpoint.compatible import check_parameters
from harness.errors import CheckpointError
from harness.formats.pt_reader import Shape
from harness.run import run_in_world
from harness.testing.pool import RankPool
from tests.support.helpers import (
    Pools,
    checkpoint,
    error_of,
    exported,
    log_text,
    losses,
    tiny_config,
)

TASK = str(Path(__file__).parents[1] / "tasks/changed_task.py")


def config_of(directory: Path, stage: int, kind: str = "", steps: int = 3, **engine: Any) -> Any:
    return tiny_config(
        directory,
        stage,
        run={"steps": steps},
        task={"path": TASK, "args": {"change": kind}},
        engines={"net": engine},
        trainer={"export_at_end": False},
    )


CHANGES: list[tuple[str, dict[str, Any], str]] = [
    ("buffer", {}, "only in this run: mask"),
    ("no buffer", {}, "only in the checkpoint: scale"),
    ("long buffer", {}, "changed: 'scale' has the shape (4,) in this run, and (1,)"),
    ("integer", {}, "changed: 'scale' has the dtype int64 in this run, and float32"),
    ("parameter", {}, "only in this run: gate"),
    ("wider", {}, "'last.weight' has the shape (5, 16) in this run, and (3, 16)"),
    ("untied", {}, "trained in this run, and not in the checkpoint: again.weight"),
    (
        "",
        {"frozen": ["first"]},
        "trained in the checkpoint, and frozen or tied in this run: first.weight, first.bias",
    ),
    ("weight norm", {}, "only in this run: last.parametrizations.weight.original0"),
    ("", {"lora": {"targets": "first"}}, "only in this run: first.base_layer.weight"),
]


@pytest.mark.parametrize(
    ("stage", "ranks", "changes"),
    [
        (0, 1, CHANGES[:4]),
        (3, 2, CHANGES[4:]),
        pytest.param(3, 2, CHANGES[:4], marks=pytest.mark.slow),
    ],
)
def test_a_changed_model_is_refused(
    pools: Pools, tmp_path: Path, stage: int, ranks: int, changes: Any
) -> None:
    pool = pools(ranks)
    first = config_of(tmp_path, stage)
    pool.run(run_in_world, first)
    model = (checkpoint(first, 3) / "manifest.json").read_text()
    for kind, engine, reason in changes:
        errors = pool.run(error_of, config_of(tmp_path, stage, kind, steps=5, **engine))
        assert all("the model of engine 'net' has changed" in text for text in errors), errors
        assert all(reason in text and "init_from" in text for text in errors), errors
    assert "resumed from" not in log_text(first)
    assert (checkpoint(first, 3) / "manifest.json").read_text() == model


def test_a_module_that_loads_its_state_itself_is_left_to_it(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    two_ranks.run(run_in_world, config_of(tmp_path, 2, "old"))
    config = config_of(tmp_path, 2, "new", steps=5)
    assert two_ranks.run(error_of, config) == ["", ""]
    assert len(losses(config)) == 5


def test_what_is_trained_in_such_a_module_may_change(two_ranks: RankPool, tmp_path: Path) -> None:
    normed = {"task": {"path": TASK, "args": {"change": "weight norm"}}}
    first = tiny_config(tmp_path, 2, **normed)
    two_ranks.run(run_in_world, first)
    then: dict[str, Any] = normed | {"engines": {"net": {"frozen": ["last"]}}}
    refused = two_ranks.run(error_of, tiny_config(tmp_path, 2, run={"steps": 8}, **then))
    assert all("run.resume_changed = 'fit'" in text for text in refused), refused
    fitted = tiny_config(tmp_path, 2, run={"steps": 8, "resume_changed": "fit"}, **then)
    assert two_ranks.run(error_of, fitted) == ["", ""]
    before, after = exported(first, 6), exported(fitted, 8)
    is_kept = {name: torch.equal(after[name], before[name]) for name in before}
    assert is_kept == {name: name.startswith("last.") or name == "scale" for name in before}


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ([{"w": (2, 3), "b": (3,), "none": (0,)}], ""),
        ([{"w": (2, 3)}], "only in the checkpoint: b"),
        ([{"w": (2, 3)}, {"b": (3,), "c": (1,)}], "only in this run: c"),
        ([{"w": (3, 2), "b": (3,)}], r"'w' has the shape \(3, 2\) in this run, and \(2, 3\)"),
        ([{"w": (2, 3)}, {"b": (3,)}], "in other parameter groups .*: b; the state of Adafactor"),
    ],
)
def test_parameters_of_a_rewrite_are_those_of_the_checkpoint(shapes: Any, reason: str) -> None:
    """Also where `check_compatible` leaves the names to the module."""
    saved: Any = SimpleNamespace(
        shapes={"w": Shape((2, 3)), "b": Shape((3,)), "empty": Shape((0,))},
        group_of=lambda name: 0,
    )
    engine: Any = SimpleNamespace(
        name="net",
        optimizer_path="Adafactor",
        can_regroup=False,
        parameter_names=[list(group) for group in shapes],
    )
    groups: list[Any] = [{name: Shape(size) for name, size in group.items()} for group in shapes]
    with pytest.raises(CheckpointError, match=reason) if reason else nullcontext():
        check_parameters(saved, engine, groups)


@pytest.mark.parametrize(
    "stage",
    [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3],
)
def test_a_path_with_wildcards_resumes(two_ranks: RankPool, tmp_path: Path, stage: int) -> None:
    for name in ("plain", "runs[1]*?"):
        for steps in (2, 4):
            two_ranks.run(run_in_world, config_of(tmp_path / name, stage, steps=steps))
    odd, plain = (config_of(tmp_path / name, stage) for name in ("runs[1]*?", "plain"))
    assert "resumed from" in log_text(odd)
    assert losses(odd) == losses(plain)
