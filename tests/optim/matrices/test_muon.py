"""Muon against torch's, unsharded; its parameter groups; its settings."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.config.engine_sections import OptimizerConfig
from harness.optim import Muon, matrix_param_groups
from harness.optim.build import build_optimizer

SHAPES = [(33, 17), (17, 40), (24, 24), (24, 24), (2, 30)]


def parameters(shapes: Any = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def step(optimizers: list[Any], lists: list[list[nn.Parameter]], steps: int) -> None:
    for number in range(steps):
        generator = torch.Generator().manual_seed(number)
        for same in zip(*lists, strict=True):
            gradient = torch.randn(same[0].shape, generator=generator)
            for parameter in same:
                parameter.grad = gradient.clone().view(parameter.shape)
        for optimizer in optimizers:
            optimizer.step()


def worst(found: list[Any], expected: list[Any]) -> float:
    pairs = zip(found, expected, strict=True)
    return max(float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in pairs)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch 2.9")
@pytest.mark.parametrize("rule", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 1e-6), ("bf16", 1e-2)])
def test_it_is_torchs(
    dtype: str, bound: float, nesterov: bool, rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's Newton-Schulz is always bf16: for the comparison in fp32 it does not convert."""
    if dtype == "fp32":
        monkeypatch.setattr(Tensor, "bfloat16", lambda tensor: tensor.clone())
    ours, theirs = parameters(), parameters()
    same: dict[str, Any] = {
        "lr": 1e-2,
        "weight_decay": 0.1,
        "nesterov": nesterov,
        "ns_steps": 5 if nesterov else 1,
    }
    optimizer = Muon(ours, adjust_lr=rule, ns_dtype=dtype, **same)  # type: ignore[arg-type]
    torchs = torch.optim.Muon(theirs, adjust_lr_fn=rule, **same)
    step([optimizer, torchs], [ours, theirs], 40)
    assert worst(ours, theirs) <= bound


def test_blocks_stacks_and_convolutions_are_matrices_of_their_own() -> None:
    """A fused query, key and value; experts; a kernel as out x rest."""
    fused, experts, kernel = ours = parameters([(30, 12), (3, 5, 7), (6, 2, 3)])
    separate = [
        nn.Parameter(matrix.detach().clone())
        for matrix in (*fused.chunk(3), *experts, kernel.view(6, 6))
    ]
    groups = [
        {"params": [fused], "heads": 3},
        {"params": [experts], "stacked": True},
        {"params": [kernel]},
    ]
    optimizers = [Muon(groups, lr=1e-2), Muon(separate, lr=1e-2)]
    for number in range(5):
        generator = torch.Generator().manual_seed(number)
        for parameter in ours:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        gradients = *fused.grad.chunk(3), *experts.grad, kernel.grad.view(6, 6)  # type: ignore
        for parameter, gradient in zip(separate, gradients, strict=True):
            parameter.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert worst([*fused.chunk(3), *experts, kernel.view(6, 6)], separate) <= 1e-6


def test_dense_parameters_take_the_steps_of_adamw() -> None:
    ours, theirs = parameters([(5, 4), (7,)]), parameters([(5, 4), (7,)])
    settings: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizer = Muon([{"params": ours, "dense": True}], lr=1.0, adam_lr=1e-2, **settings)
    adamw = torch.optim.AdamW(theirs, lr=1e-2, fused=True, **settings)
    step([optimizer, adamw], [ours, theirs], 5)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("size", [torch.inf, torch.nan, 1e30])
@pytest.mark.parametrize("on_device", [False, True])
def test_a_first_gradient_that_is_not_finite_changes_nothing(
    size: float, on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do later steps know of it. `on_device`: on the way that devices go."""
    if on_device:
        for module in ("groups", "optimizer", "muon"):
            monkeypatch.setattr(f"harness.optim.matrices.{module}.may_branch", lambda _: False)
    ours, theirs = parameters([(5, 4), (4, 4), (7,)]), parameters([(5, 4), (4, 4), (7,)])
    start = [parameter.detach().clone() for parameter in ours]

    def muon(of: list[nn.Parameter]) -> Muon:
        groups = [{"params": of[:2]}, {"params": of[2:], "dense": True}]
        return Muon(groups, lr=1e-2, weight_decay=0.1)

    optimizer, reference = muon(ours), muon(theirs)
    for parameter in ours:
        parameter.grad = torch.ones_like(parameter)
    ours[1].grad[2, 1] = size  # type: ignore[index]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, start, strict=True))
    for parameter in ours[:2]:
        assert not optimizer.state[parameter]["momentum_buffer"].any()
    step([optimizer, reference], [ours, theirs], 3)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.qkv = nn.Linear(8, 24)
        self.up = nn.Linear(8, 16)
        self.experts = nn.Parameter(torch.randn(3, 8, 8))
        self.lm_head = nn.Linear(8, 10, bias=False)


def test_matrices_are_chosen_as_for_apollo_and_split() -> None:
    groups = matrix_param_groups(Fused(), heads={"qkv": 3}, lr=2.0)
    found = {
        tuple(group["param_names"]): {k: v for k, v in group.items() if not k.startswith("param")}
        for group in groups
    }
    assert found == {
        ("up.weight",): {"dense": False, "lr": 2.0},
        ("experts",): {"dense": False, "lr": 2.0, "stacked": True},
        ("qkv.weight",): {"dense": False, "lr": 2.0, "heads": 3},
        ("embed.weight", "qkv.bias", "up.bias", "lm_head.weight"): {"dense": True},
    }
    with pytest.raises(ValueError, match="heads: 'kqv' matches no matrix"):
        matrix_param_groups(Fused(), heads={"kqv": 3})
    for selection, message in {
        "matrices": "matrices = '(' is not a regular expression: missing )",
        "heads": "heads = '(' is not valid: expected a table",
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            matrix_param_groups(Fused(), **{selection: "("})  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="no parameter is a matrix"):
        matrix_param_groups(nn.Embedding(3, 3))


def test_from_a_config() -> None:
    """`groups` and `no_decay` too; a group keeps its ratio to `lr` in its dense part."""
    table = {
        "name": "muon",
        "lr": 0.02,
        "adam_lr": 1e-3,
        "weight_decay": 0.1,
        "heads": {"qkv": 3},
        "no_decay": True,
        "groups": [
            {"name": "slow", "match": "up", "lr": "x0.5"},
            {"name": "plain", "match": "experts", "dense": True},
        ],
    }
    optimizer = build_optimizer(Fused(), OptimizerConfig.model_validate(table))
    assert isinstance(optimizer, Muon)
    found = {
        name: (group["lr"], group["dense"], group["heads"], group["weight_decay"])
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    assert found == {
        "qkv.weight": (0.02, False, 3, 0.1),
        "embed.weight": (1e-3, True, 1, 0.1),
        "lm_head.weight": (1e-3, True, 1, 0.1),
        "qkv.bias": (1e-3, True, 1, 0.0),
        "up.weight": (0.01, False, 1, 0.1),
        "up.bias": (5e-4, True, 1, 0.0),
        "experts": (1e-3, True, 1, 0.1),
    }


@pytest.mark.parametrize(
    ("groups", "settings", "message"),
    [
        ({}, {"ns_dtype": "fp16"}, "ns_dtype = 'fp16' is not valid"),
        ({}, {"momentum": 1.0}, "momentum = 1.0 is not valid"),
        ({}, {"adjust_lr": "moonlight"}, "adjust_lr = 'moonlight' is not valid"),
        ({}, {"ns_steps": 0}, "ns_steps = 0 is not valid"),
        ({}, {"nesterov": "false"}, "nesterov = 'false' is not valid"),
        ({}, {"momentum": "0.9"}, "momentum = '0.9' is not valid"),
        ({}, {"betas": 0.9}, "betas = 0.9 is not valid"),
        ({}, {"adam_lr": -1.0}, r"adam_lr = -1.0 is not valid"),
        ({"heads": 3}, {}, r"'0.0' of shape \(4, 3\) cannot be split into heads = 3 blocks"),
        (
            {"stacked": True},
            {},
            r"\(4, 3\) is not a matrix per slice: move it to a group with dense = True",
        ),
    ],
)
def test_invalid_settings(groups: Any, settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Muon([{"params": [nn.Parameter(torch.ones(4, 3))], **groups}], **settings)


def test_the_state_of_deepspeeds_muon_is_refused() -> None:
    optimizer = Muon([nn.Parameter(torch.ones(4, 3))])
    theirs = optimizer.state_dict()
    theirs["param_groups"] = [{"params": [0], "lr": 1.0, "momentum": 0.9, "use_muon": True}]
    with pytest.raises(ValueError, match=r"use optimizer\.name = 'muon-deepspeed'"):
        optimizer.load_state_dict(theirs)
