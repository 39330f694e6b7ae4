"""A model whose gradients are given, under DeepSpeed, against the same optimizer unsharded."""

from collections.abc import Callable
from functools import cache
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from harness import distributed
from harness.optim import Apollo, ApolloMini

Shapes = dict[str, tuple[int, ...]]

SHAPES: Shapes = {
    "tall": (33, 17),
    "wide": (17, 40),
    "table": (50, 6),
    "square": (24, 24),
    "kernel": (5, 3, 3),
    "experts": (3, 9, 11),
    "long": (3, 211),
    "bias": (7,),
}
"""Odd sizes, so that the boundaries of shards are inside of rows."""


class Given(nn.Module):
    """Parameters p and a loss of sum(p * g): the gradients are g."""

    def __init__(self, shapes: Shapes = SHAPES):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name, shape in shapes.items():
            start = torch.randn(shape, generator=generator).bfloat16().float()
            self.register_parameter(name, nn.Parameter(start))

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        terms = [(p * gradients[name].to(p)).sum() for name, p in self.named_parameters()]
        return torch.stack(terms).sum()


def gradients_of(step: int, shapes: Shapes = SHAPES) -> dict[str, Tensor]:
    """Three times numbers of four bits: two to four ranks average them exactly, even in bf16,
    whether they divide before they add up or after."""
    generator = torch.Generator().manual_seed(100 + step)
    size = 4.0 if step % 7 == 0 else 1.0  # so that the norm-growth limiter acts
    found = {}
    for name, shape in shapes.items():
        mantissa, exponent = torch.frexp(torch.randn(shape, generator=generator) * size)
        found[name] = torch.ldexp((mantissa * 16).round() * 3, exponent - 5)
    return found


def apollo(model: nn.Module, mini: bool = False, **settings: Any) -> Apollo:
    """Two low-rank groups, stacked experts, and a dense group; P is refreshed every 15 steps."""
    named = dict(model.named_parameters())

    def group(*names: str, **options: Any) -> dict[str, Any]:
        return {"params": [named[n] for n in names], "param_names": list(names), **options}

    settings = {"lr": 1e-2, "update_proj_gap": 15, "weight_decay": 0.1, "scale": 2.0} | settings
    rank = 1 if mini else 4
    kind = ApolloMini if mini else Apollo
    return kind(
        [
            group("tall", "wide", "square", "long", rank=rank),
            group("kernel", rank=1 if mini else 3, lr=3e-3, weight_decay=0.0),
            group("experts", rank=rank, stacked=True),
            group("table", "bias", rank=0),
        ],
        **settings,
    )


def config_of(stage: int, dtype: str, overrides: dict[str, Any]) -> dict[str, Any]:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **overrides,
        "zero_optimization": zero | overrides.get("zero_optimization", {}),
    }
    return config if dtype == "fp32" else config | {dtype: {"enabled": True}}


def engine_of(
    model: nn.Module, optimizer: Any, stage: int, dtype: str, overrides: dict[str, Any]
) -> Any:
    config = config_of(stage, dtype, overrides)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def take_steps(engine: Any, steps: range, shapes: Shapes = SHAPES) -> None:
    for step in steps:
        for _ in range(engine.gradient_accumulation_steps()):
            engine.backward(engine(gradients_of(step, shapes)))
            engine.step()


def take_plain_steps(
    model: nn.Module, optimizer: Any, steps: range, shapes: Shapes = SHAPES
) -> None:
    for step in steps:
        gradients = gradients_of(step, shapes)
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].to(parameter.dtype)
        optimizer.step()


def masters(optimizer: Apollo) -> dict[str, Tensor]:
    """Every parameter's fp32 master, flattened, joined from all ranks' shards. Collective."""
    own = [
        (s.name, s.start, flat.detach().flatten()[s.offset :][: s.length].cpu())
        for _, flats, shards in optimizer._located.values()
        for flat, shard in zip(flats, shards, strict=True)
        for s in shard.own
    ]
    full: dict[str, Tensor] = {}
    for name, start, part in (entry for rank in distributed.all_gather(own) for entry in rank):
        size = torch.Size(optimizer._shapes[name]).numel()
        full.setdefault(name, torch.full((size,), torch.nan))[start : start + len(part)] = part
    return full


def worst(found: dict[str, Tensor], model: nn.Module) -> float:
    """The largest |difference| / max|reference| over all parameters."""
    return max(
        float((found[name] - p.detach().flatten()).abs().max() / p.detach().abs().max())
        for name, p in model.named_parameters()
    )


@cache
def plain(
    make: Callable[..., Any], mini: bool, steps: int, settings: tuple[tuple[str, Any], ...] = ()
) -> tuple[Given, Any]:
    """The model after these unsharded steps, and its optimizer; made once per process, so neither
    may be changed."""
    model = Given()
    optimizer = make(model, mini, **dict(settings))
    take_plain_steps(model, optimizer, range(steps))
    return model, optimizer


def difference(
    stage: int,
    dtype: str,
    mini: bool,
    overrides: dict[str, Any],
    steps: int = 40,
    settings: dict[str, Any] | None = None,
    make: Callable[..., Apollo] = apollo,
    born_sharded: bool = False,
) -> float:
    """How far training under DeepSpeed ends from training unsharded. Collective.

    `born_sharded`: the model is made under zero.Init, where no rank ever has a complete parameter.
    """
    settings = settings or {}
    with deepspeed.zero.Init(
        config_dict_or_path=config_of(stage, dtype, overrides), enabled=born_sharded
    ):
        model = Given()
    optimizer = make(model, mini, **settings)
    engine = engine_of(model, optimizer, stage, dtype, overrides)
    take_steps(engine, range(steps))
    found = masters(optimizer)
    engine.destroy()
    return worst(found, plain(make, mini, steps, tuple(settings.items()))[0])
