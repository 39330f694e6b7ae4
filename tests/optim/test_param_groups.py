"""Parameter groups of the config: which parameters get which settings, and the same under ZeRO."""

from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from pydantic import ValidationError
from torch import Tensor, nn

from harness.config.engine_sections import OptimizerConfig
from harness.errors import ConfigError
from harness.optim.build import build_optimizer
from harness.testing.pool import RankPool
from tests.support.given_gradients import Given, engine_of, gradients_of, take_plain_steps
from tests.support.helpers import OFFLOAD


class Small(nn.Module):
    """Embedding, norm, a 0-dimensional parameter, and a head that is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.norm = nn.LayerNorm(8)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.words.weight


VECTORS = ["scale", "blocks.1.bias", "blocks.2.bias", "norm.weight", "norm.bias"]


def settings(groups: Any = (), name: str = "adamw", **others: Any) -> OptimizerConfig:
    named = [{"name": f"g{number}", **group} for number, group in enumerate(groups)]
    return OptimizerConfig.model_validate({"name": name, "lr": 1.0, "groups": named, **others})


def groups_of(config: OptimizerConfig, model: nn.Module | None = None) -> list[dict[str, Any]]:
    """Torch's groups, with the names of their parameters."""
    model = model or Small()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, config)
    return [
        group | {"params": [names[id(p)] for p in group["params"]]}
        for group in optimizer.param_groups
    ]


def test_the_first_group_that_matches_gets_a_parameter() -> None:
    found = groups_of(
        settings(
            [
                {"match": r"blocks\.0", "lr": "x0.1", "betas": [0.5, 0.6]},
                {"match": r"blocks\.\d\.weight", "lr": 3, "weight_decay": 0.3},
                {"match": "head"},
            ],
            weight_decay=0.2,
        )
    )
    assert [(g["name"], g["params"], g["lr"], g["weight_decay"]) for g in found] == [
        (
            "default",
            ["scale", "blocks.1.bias", "blocks.2.bias", "norm.weight", "norm.bias"],
            1,
            0.2,
        ),
        ("g0", ["blocks.0.weight", "blocks.0.bias"], 0.1, 0.2),
        ("g1", ["blocks.1.weight", "blocks.2.weight"], 3, 0.3),
        ("g2", ["words.weight"], 1, 0.2),  # tied: it matches by any of its names
    ]
    assert [group["betas"] for group in found] == [(0.9, 0.999), [0.5, 0.6], *[(0.9, 0.999)] * 2]


def test_a_group_may_have_all_parameters() -> None:
    (group,) = groups_of(settings([{"match": ".*"}]))
    assert group["name"] == "g0" and len(group["params"]) == 10


def test_no_decay_frees_vectors_in_every_group() -> None:
    found = groups_of(
        settings(
            [{"match": r"blocks\.0", "weight_decay": 0.3}, {"match": "norm", "weight_decay": 0}],
            no_decay=True,
        )
    )
    assert [(g["name"], g["params"], g["weight_decay"]) for g in found] == [
        ("default", ["words.weight", "blocks.1.weight", "blocks.2.weight"], 0.01),
        ("default", ["scale", "blocks.1.bias", "blocks.2.bias"], 0.0),
        ("g0", ["blocks.0.weight"], 0.3),
        ("g0", ["blocks.0.bias"], 0.0),
        ("g1", ["norm.weight", "norm.bias"], 0),
    ]


def test_groups_are_split_further_for_apollo() -> None:
    head = {"match": r"blocks\.0|head", "lr": "x0.5", "scale": 3.0, "rank": 2}
    found = groups_of(settings([head], name="apollo", rank=4, no_decay=True, weight_decay=0.1))
    kinds = [(g["name"], g["rank"], g["params"], g["weight_decay"], g["lr"]) for g in found]
    assert kinds == [
        ("default", 4, ["blocks.1.weight", "blocks.2.weight"], 0.1, 1),
        (
            "default",
            0,
            ["scale", "blocks.1.bias", "blocks.2.bias", "norm.weight", "norm.bias"],
            0,
            1,
        ),
        ("g0", 2, ["blocks.0.weight"], 0.1, 0.5),
        ("g0", 0, ["words.weight"], 0.1, 0.5),
        ("g0", 0, ["blocks.0.bias"], 0, 0.5),
    ]
    assert [group["scale"] for group in found] == [1.0, 1.0, 3.0, 3.0, 3.0]
    assert found[2]["param_names"] == ["blocks.0.weight"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (settings([{"match": "hed"}]), "'g0': match = 'hed' matches no parameter (did you mean 'h"),
        (
            settings([{"match": "blocks.4"}]),
            "'blocks.4' matches no parameter (did you mean",
        ),
        (settings([{"match": "frozen"}]), "'frozen' matches only frozen parameters: frozen"),
        (
            settings([{"match": "blocks"}, {"match": r"blocks\.1"}]),
            "'g1': match = 'blocks\\\\.1' matches only parameters of earlier groups: blocks.1.w",
        ),
        (
            settings([{"match": "norm", "beta": 3}]),
            "'g0': unknown key 'beta' (did you mean",
        ),
        (settings([{"match": "norm", "params": []}]), "'g0': unknown key 'params'"),
        (settings([{"match": "norm", "weight_decay": -1}]), "'g0': Invalid weight_decay"),
        (settings([{"match": "norm", "gamma": 0.1}], name="apollo"), "gamma = 0.1 is not valid"),
        (
            settings([{"match": "norm"}], name="muon-deepspeed"),
            "groups and no_decay are not supported",
        ),
        (settings(name="torch.optim:Rprop", no_decay=True), "it has no weight_decay"),
    ],
)
def test_what_cannot_be_is_a_config_error(config: OptimizerConfig, message: str) -> None:
    model = Small()
    model.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    with pytest.raises(ConfigError) as error:
        build_optimizer(model, config)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"name": "a", "match": "("}], "'(' is not a regular expression"),
        ([{"name": "a", "match": "x", "lr": "0.1"}], "found '0.1', expected a number >= 0, or"),
        ([{"name": "a", "match": "x", "lr": "xx"}], 'or a factor like "x0.1"'),
        ([{"name": "a", "match": "x", "lr": -1}], "found -1.0, expected a number >= 0"),
        ([{"name": "default", "match": "x"}], "the name of the parameters that no group matches"),
        ([{"name": "a/b", "match": "x"}], "should match pattern"),
        ([{"name": "a", "match": "x"}, {"name": "a", "match": "y"}], "two groups are named 'a'"),
        ([{"name": "a"}], "Field required"),
    ],
)
def test_a_wrong_table_is_known_before_torch_is_imported(groups: Any, message: str) -> None:
    with pytest.raises(ValidationError) as error:
        OptimizerConfig.model_validate({"groups": groups})
    assert message in str(error.value)


def test_a_table_without_groups_reads_as_before() -> None:
    """Checkpoints hold its repr, to notice that the config has changed."""
    config = OptimizerConfig.model_validate({"name": "adamw", "lr": 0.01, "weight_decay": 0.1})
    assert repr(config) == "OptimizerConfig(name='adamw', lr=0.01, weight_decay=0.1)"


# ------------------------------------------------------------------------------------ under ZeRO

GROUPS = settings(
    [
        {"match": "tall|kernel", "lr": "x0.1", "weight_decay": 0.5},
        {"match": "square", "lr": 3e-3, "betas": [0.5, 0.9]},
    ],
    no_decay=True,
    weight_decay=0.2,
).model_copy(update={"lr": 1e-2})
BY_HAND: list[dict[str, Any]] = [
    {"params": ["wide", "table", "experts", "long"]},
    {"params": ["bias"], "weight_decay": 0.0},
    {"params": ["tall", "kernel"], "lr": 1e-3, "weight_decay": 0.5},
    {"params": ["square"], "lr": 3e-3, "betas": (0.5, 0.9)},
]


def trained(stage: int, dtype: str, overrides: dict[str, Any], steps: int) -> dict[str, Tensor]:
    """The masters after some steps under DeepSpeed; at stage 0 the weights. Collective."""
    model = Given()
    engine = engine_of(model, build_optimizer(model, GROUPS), stage, dtype, overrides)
    for step in range(steps):
        engine.backward(engine(gradients_of(step)))
        engine.step()
    found = {}
    for name, parameter in model.named_parameters():
        master = parameter.detach() if not stage else safe_get_full_fp32_param(parameter)
        assert master is not None
        found[name] = master.clone()
    engine.destroy()
    return found


@pytest.mark.parametrize(
    ("stage", "dtype", "overrides"),
    [
        *((stage, "fp32", {}) for stage in (0, 1, 2, 3)),
        *((stage, "bf16", {}) for stage in (0, 1, 2, 3)),
        *((1, "bf16", OFFLOAD), (2, "fp32", OFFLOAD), (3, "bf16", OFFLOAD)),
    ],
)
def test_groups_under_zero_are_torchs(
    two_ranks: RankPool, stage: int, dtype: str, overrides: dict[str, Any]
) -> None:
    steps = 6
    model = Given()
    named = dict(model.named_parameters())
    groups = [group | {"params": [named[n] for n in group["params"]]} for group in BY_HAND]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.2)
    take_plain_steps(model, optimizer, range(steps))
    for found in two_ranks.run(trained, stage, dtype, overrides, steps):
        for name, expected in named.items():
            if stage or dtype == "fp32":
                torch.testing.assert_close(found[name], expected.detach(), rtol=0, atol=1e-6)
            else:
                rounded = expected.detach().bfloat16()
                torch.testing.assert_close(found[name], rounded, rtol=2**-7, atol=1e-6)
