"""Parameter groups in a run: against torch's own, commanded, resumed, and moved by name."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness import distributed
from harness.config import Config
from harness.config.sections import merge
from harness.data.sampler import RandomSampler
from harness.engine.lora import adapt
from harness.io.stored import read_tensor
from harness.run import run_in_world
from harness.task import load_task
from harness.testing.pool import RankPool
from harness.zero.reader import SavedEngine
from tests.support.commanded import commanded
from tests.support.helpers import (
    OFFLOAD,
    Pools,
    checkpoint,
    error_of,
    exported,
    log_text,
    losses,
    records,
    tiny_config,
)
from tests.support.quick import quick

STAGES = [0, 1, 2, 3]
HEAD = {"name": "head", "match": "last", "lr": "x0.1", "weight_decay": 0.4}
MIDDLE = {"name": "middle", "match": r"again\.\w+", "betas": [0.5, 0.9]}
SHARD_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def config_of(
    directory: Path, layout: tuple[int, int] = (2, 1), steps: int = 8, **overrides: Any
) -> Config:
    """A run with groups on `(ranks, stage)` with a batch of 8."""
    world, stage = layout
    optimizer = {"name": "adamw", "groups": [HEAD, MIDDLE], "no_decay": True}
    table = {
        "run": {"steps": steps},
        "data": {"micro_batch_size": 8 // world},
        "engines": {
            "net": {
                "optimizer": optimizer,
                "scheduler": {"name": "cosine", "warmup": 2},
                "ds_overrides": SHARD_ALL,
            }
        },
        "trainer": {"save_every": 4},
    }
    return tiny_config(directory, stage, **merge(table, overrides))


def plain_loop(config: Config) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights of one process with torch's groups, written by hand."""
    distributed.seed_everything(config.run.seed)
    task, settings = load_task(config), config.engines["net"]
    model: Any = task.models["net"]
    if settings.lora is not None:
        adapt(model, settings.lora)
    if settings.frozen:
        model.first.requires_grad_(False)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    head = {n: p for n, p in trained.items() if n.startswith("last.")}
    middle = [trained[n] for n in trained if n.startswith("middle.")]
    rest = [trained[n] for n in trained if n.startswith("first.")]

    def split(parameters: list[nn.Parameter], weight_decay: float, **options: Any) -> Any:
        vectors = [p for p in parameters if p.ndim < 2]
        matrices = [p for p in parameters if p.ndim > 1]
        yield {"params": matrices, "weight_decay": weight_decay, **options}
        yield {"params": vectors, "weight_decay": 0.0, **options}

    groups = [
        *split(rest, 0.1),
        *split(list(head.values()), 0.4, lr=1e-3),
        *split(middle, 0.1, betas=(0.5, 0.9)),
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    steps = config.run.steps
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps - 2)
    bases = [group["lr"] for group in optimizer.param_groups]
    draws = RandomSampler(len(task.train_data), seed=config.run.seed).stream()
    found = []
    for step in range(steps):
        if step < 2:
            for group, base in zip(optimizer.param_groups, bases, strict=True):
                group["lr"] = base * (step + 1) / 2
        batch = task.collate([task.train_data[next(draws)] for _ in range(8)])
        model(*batch)
        model.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step >= 2:
            cosine.step()
        found.append(model.loss.item())
    return found, {n: p.detach() for n, p in trained.items()}


LORA = {"lora": {"targets": "first|last", "rank": 3}}
KINDS: dict[str, dict[str, Any]] = {
    "all": {},
    "frozen": {"frozen": ["first"]},
    "offload": {"ds_overrides": OFFLOAD},
    "lora": LORA | {"optimizer": {"groups": [HEAD]}},
}


@pytest.mark.parametrize(
    ("kind", "stage"),
    quick(
        [
            *(("all", stage) for stage in STAGES),
            *(("frozen", 2), ("frozen", 3)),
            *(("offload", 1), ("offload", 3)),
            *(("lora", 0), ("lora", 3)),
        ],
        *(("all", 1), ("all", 3), ("frozen", 2), ("offload", 3), ("lora", 0)),
    ),
)
def test_groups_of_a_run_are_torchs(
    two_ranks: RankPool, tmp_path: Path, kind: str, stage: int
) -> None:
    if kind == "lora":
        pytest.importorskip("peft", reason="needs the extra: lora")
    config = config_of(tmp_path, (2, stage), engines={"net": KINDS[kind]})
    two_ranks.run(run_in_world, config)
    expected, weights = plain_loop(config)
    assert losses(config) == pytest.approx(expected, abs=2e-6, rel=0)
    saved = SavedEngine(checkpoint(config, 8) / "net")
    assert saved.shapes.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(read_tensor(saved.master(name)), weight, atol=1e-6, rtol=0)
    assert {"head"} <= {group["name"] for group in saved.groups}


# ------------------------------------------------------------------------------------ commands


def test_each_group_has_its_rate_and_its_commands(two_ranks: RankPool, tmp_path: Path) -> None:
    live = {"engines": {"net": {"scheduler": None}}, "control": {"stdin": True}}
    config = config_of(tmp_path, (2, 3), **live)
    lines = ["lr net/head x0.5@1", "lr head x0.5@2", "lr net/middle 3e-3@3", "lr x0.1@4"]
    lines += ["lr head auto@5", "lr net 2e-2@6", "lr hed x2", ""]
    _, text = two_ranks.run(commanded, config, "\n".join(lines))[0]
    rates = [[r["lr"], r["lr/head"], r["lr/middle"]] for r in records(config)]
    expected = [
        [1e-2, 1e-3, 1e-2],
        [1e-2, 5e-4, 1e-2],
        [1e-2, 2.5e-4, 1e-2],
        [1e-2, 2.5e-4, 3e-3],
        [1e-3, 2.5e-5, 3e-4],
        [1e-3, 1e-3, 3e-4],
        [2e-2, 2e-3, 2e-2],
        [2e-2, 2e-3, 2e-2],
    ]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor(expected))
    assert "net: lr 0.01, lr/head 0.0005, lr/middle 0.01" in text
    assert "found 'hed', expected net, net/default, net/head, net/middle" in text
    audit = (config.run_dir / "commands.jsonl").read_text()
    assert "lr net/middle 3e-3" in audit
    shutil.rmtree(checkpoint(config, 8))
    two_ranks.run(commanded, config, "")
    assert [[r["lr"], r["lr/head"], r["lr/middle"]] for r in records(config)] == rates
    for change in ("lr x0.1", "lr/head x0.025", "lr/middle held at 0.003", "lr/middle x0.1"):
        assert f"restored live change: net: {change}" in log_text(config)


def test_task_groups_come_after_those_of_the_config(two_ranks: RankPool, tmp_path: Path) -> None:
    groups = [
        {"name": "biases", "match": r".*\.bias", "lr": 5e-3},
        {"name": "first", "match": "first", "lr": "x3"},
    ]
    config = config_of(tmp_path, (2, 2), 2, task={"args": {"parameter_groups": {"net": groups}}})
    two_ranks.run(run_in_world, config)
    saved = SavedEngine(checkpoint(config, 2) / "net")
    names = {name: saved.groups[saved.group_of(name)]["name"] for name in saved.shapes}
    assert names == {
        "first.weight": "first",
        "first.bias": "biases",
        "middle.weight": "middle",
        "last.weight": "head",
        "last.bias": "head",
    }
    # The first group is that of the config, as no parameter is left for "default".
    assert records(config)[1]["lr/biases"] == pytest.approx(5 * records(config)[1]["lr"])


WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"engines": {"net": {"optimizer": {"groups": [HEAD | {"match": "lats"}]}}}},
        "engines.net: optimizer 'adamw': optimizer.groups: group 'head': match = 'lats' matches no "
        "parameter (did you mean 'last'?); the model has: first.weight",
    ),
    (
        {"task": {"args": {"parameter_groups": {"nte": [HEAD]}}}},
        "Task.parameter_groups['nte']: no engine of that name is trained (did you mean 'net'?)",
    ),
    (
        {"task": {"args": {"parameter_groups": {"net": [HEAD]}}}},
        "Task.parameter_groups['net']: groups: two groups are named 'head'",
    ),
    (
        {"task": {"args": {"parameter_groups": {"net": [{"name": "a", "math": ".*"}]}}}},
        "Task.parameter_groups['net']: match: Field required",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), WRONG)
def test_wrong_groups_end_the_run_before_step_1(
    two_ranks: RankPool, tmp_path: Path, overrides: Mapping[str, Any], message: str
) -> None:
    for error in two_ranks.run(error_of, config_of(tmp_path, (2, 1), 2, **overrides)):
        assert message in error


# ------------------------------------------------------------------------------------ resuming


def move_checkpoint(full: Config, resumed: Config) -> None:
    shutil.copytree(checkpoint(full, 4), checkpoint(resumed, 4))


@pytest.mark.parametrize(
    ("before", "after"),
    quick(
        [((2, 1), (1, 3)), ((2, 3), (4, 2)), ((1, 0), (2, 3)), ((4, 2), (2, 0))],
        ((2, 3), (4, 2)),
        ((1, 0), (2, 3)),
    ),
)
def test_groups_are_resharded(
    pools: Pools, tmp_path: Path, before: tuple[int, int], after: tuple[int, int]
) -> None:
    full, resumed = config_of(tmp_path / "full", before), config_of(tmp_path / "resumed", after)
    pools(before[0]).run(run_in_world, full)
    move_checkpoint(full, resumed)
    pools(after[0]).run(run_in_world, resumed)
    assert losses(resumed) == pytest.approx(losses(full)[4:], abs=1e-6, rel=0)
    for name, weight in exported(full).items():
        torch.testing.assert_close(exported(resumed)[name], weight, atol=1e-6, rtol=0)


ALIKE: list[dict[str, Any]] = [
    {"groups": [], "no_decay": False},
    {"groups": [{"name": "last", "match": "last"}]},
    {"groups": [{"name": "all", "match": "first|last"}, {"name": "m", "match": "middle"}]},
]
"""Without weight decay the same training, in other groups."""


@pytest.mark.parametrize("stage", quick(STAGES, 1, 3))
def test_parameters_change_groups_with_their_state(
    two_ranks: RankPool, tmp_path: Path, stage: int
) -> None:
    """From no groups to some, to others, and back to none."""

    def config(name: str, groups: dict[str, Any]) -> Config:
        engine = {"optimizer": {"weight_decay": 0.0, **groups}}
        return config_of(tmp_path / name, (2, stage), 12, engines={"net": engine})

    previous = full = config("full", ALIKE[0])
    two_ranks.run(run_in_world, full)
    for step, groups in ((4, ALIKE[1]), (8, ALIKE[2]), (8, ALIKE[0])):
        resumed = config(f"resumed-{step}-{len(groups['groups'])}", groups)
        shutil.copytree(checkpoint(previous, step), checkpoint(resumed, step))
        two_ranks.run(run_in_world, resumed)
        assert losses(resumed) == pytest.approx(losses(full)[step:], abs=1e-6, rel=0)
        previous = resumed


def test_a_group_without_an_option_has_the_optimizers_again(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    """Saved with a weight decay of 0.4 for the head, and resumed without that line."""
    full = config_of(tmp_path / "full", (2, 1), 4)
    two_ranks.run(run_in_world, full)
    head = {key: value for key, value in HEAD.items() if key != "weight_decay"}
    optimizer = {"groups": [head, MIDDLE]}
    resumed = config_of(tmp_path / "resumed", (2, 1), 6, engines={"net": {"optimizer": optimizer}})
    move_checkpoint(full, resumed)
    two_ranks.run(run_in_world, resumed)
    groups = SavedEngine(checkpoint(resumed, 6) / "net").groups
    assert {g["name"]: g["weight_decay"] for g in groups if g["weight_decay"]} == {
        "default": 0.1,
        "head": 0.1,
        "middle": 0.1,
    }


# ------------------------------------------------------------------------------------ APOLLO

APOLLO = {"name": "apollo", "rank": 3, "low_rank": "last.weight", "update_proj_gap": 2}


def apollo_config(directory: Path, layout: tuple[int, int], groups: list[Any]) -> Config:
    optimizer = APOLLO | {"groups": groups}
    return config_of(directory, layout, engines={"net": {"optimizer": optimizer}})


@pytest.mark.parametrize(("before", "after"), [((2, 1), (1, 0)), ((2, 3), (2, 2))])
def test_apollo_has_groups_at_every_stage(
    pools: Pools, tmp_path: Path, before: tuple[int, int], after: tuple[int, int]
) -> None:
    groups = [HEAD | {"scale": 2.0}, {"name": "middle", "match": "middle", "lr": "x0.5"}]
    full, resumed = (
        apollo_config(tmp_path / name, layout, groups)
        for name, layout in (("full", before), ("resumed", after))
    )
    pools(before[0]).run(run_in_world, full)
    move_checkpoint(full, resumed)
    pools(after[0]).run(run_in_world, resumed)
    assert losses(resumed) == pytest.approx(losses(full)[4:], abs=1e-5, rel=0)
    last = records(resumed)[-1]
    assert (last["lr/head"], last["lr/middle"]) == pytest.approx((last["lr"] / 10, last["lr"] / 2))
    saved = SavedEngine(checkpoint(resumed, 8) / "net")
    kinds = [(g["name"], g["rank"], g["weight_decay"], g["scale"]) for g in saved.groups]
    assert kinds == [
        ("default", 3, 0.1, 1.0),
        ("default", 0, 0.0, 1.0),
        ("head", 3, 0.4, 2.0),
        ("head", 0, 0.0, 2.0),
        ("middle", 3, 0.1, 1.0),
    ]


def test_apollo_keeps_the_groups_that_it_was_saved_with(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    full = apollo_config(tmp_path / "full", (2, 1), [HEAD])
    two_ranks.run(run_in_world, full)
    resumed = apollo_config(tmp_path / "resumed", (2, 1), [])
    move_checkpoint(full, resumed)
    for error in two_ranks.run(error_of, resumed):
        assert "in other parameter groups than in the checkpoint: last.weight, last.bias" in error
        assert "restore the old groups" in error
