"""APOLLO on several ranks: what it sends, what it refuses, and that all ranks do the same."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from harness import devices, distributed
from harness.optim import Apollo, apollo_param_groups
from harness.testing.pool import RankPool
from harness.zero.shards import ShardError, locate
from tests.support.given_gradients import (
    Given,
    apollo,
    engine_of,
    gradients_of,
    masters,
    take_plain_steps,
    take_steps,
    worst,
)
from tests.support.helpers import Pools
from tests.support.quick import quick
from tests.support.waits import Waits

COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast")


def what_a_step_does(stage: int, overrides: dict[str, Any]) -> tuple[list[list[str]], list[str]]:
    """The collectives in each call of step(), and the waits, once the layout is known: on the way
    that devices go."""
    model = Given()
    optimizer = apollo(model)
    engine = engine_of(model, optimizer, stage, "bf16" if overrides else "fp32", overrides)
    take_steps(engine, range(2))
    calls: list[list[str]] = []
    waits = Waits()
    step = Apollo.step

    def watched(self: Apollo) -> None:
        calls.append([])
        with waits:
            step(self)

    def counted(name: str, collective: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[-1].append(name)
            return collective(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(devices.LIMITS, "cpu", devices.LIMITS["cuda"])
        patch.setattr(optimizer, "step", watched.__get__(optimizer))
        engine.backward(engine(gradients_of(2)))
        for name in COLLECTIVES:
            patch.setattr(dist, name, counted(name, getattr(dist, name)))
        calls.append([])  # for DeepSpeed's own, ahead of the first call
        engine.step()
    engine.destroy()
    return calls[1:], waits.found


@pytest.mark.parametrize(
    ("stage", "overrides", "calls"),
    [
        (1, {}, 4),
        (2, {}, 4),
        (3, {}, 4),
        (1, {"data_types": {"grad_accum_dtype": "fp32"}}, 1),
    ],
)
def test_two_collectives_and_no_wait(
    two_ranks: RankPool, stage: int, overrides: dict[str, Any], calls: int
) -> None:
    for seen, waits in two_ranks.run(what_a_step_does, stage, overrides):
        assert len(seen) == calls
        for ours in seen:
            found = [name for name in ours if name in COLLECTIVES[1:3]][:2]
            assert ours[: len(found)] == found
            assert found in (
                ["reduce_scatter_tensor", "all_gather_into_tensor"],
                ["reduce_scatter_tensor"],
            )
            assert ours.count("reduce_scatter_tensor") == 1
        assert waits == []


@pytest.mark.parametrize("mini", [False, True])
def test_no_operator_waits_for_the_device(mini: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an operator reads of a device by itself, which the profiler sees. (Fused Adam reads its
    steps on CPUs only.)"""
    monkeypatch.setitem(devices.LIMITS, "cpu", devices.LIMITS["cuda"])
    model = Given()
    optimizer = apollo(model, mini)
    take_plain_steps(model, optimizer, range(1))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    events = profile.events() or []
    reads = [event for event in events if event.name == "aten::_local_scalar_dense"]
    readers = {event.cpu_parent.cpu_parent.name for event in reads}
    assert readers <= {"aten::_fused_adam_", "aten::_fused_adamw_"}


def first_step_error(stage: int, overrides: dict[str, Any], spoil: bool) -> str:
    """The error of the first step, after rank 1 has changed weights without their masters."""
    shapes = {"a": (4, 6), "b": (5, 3)}
    model = Given(shapes)
    group = {"params": list(model.parameters()), "param_names": list(shapes)}
    optimizer = Apollo([group], rank=2)
    engine = engine_of(model, optimizer, stage, "bf16", overrides)
    if spoil and distributed.global_rank() == 1:
        weights = [engine.optimizer.lp_param_buffer] if stage == 3 else model.parameters()
        for weight in weights:
            weight.data += 1
    engine.backward(engine({name: torch.ones(shape) for name, shape in shapes.items()}))
    try:
        engine.step()
    except ShardError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_weights_that_are_not_those_of_the_masters_are_refused_by_all(stage: int) -> None:
    with RankPool(2) as pool:  # of its own, since DeepSpeed is left in mid-step
        first, second = pool.run(first_step_error, stage, {}, True)
    assert first == "another rank failed to locate its shards: see its error"
    assert second.startswith("parameter 'a': expected its elements ")


def test_elastic_checkpoints_are_refused_by_all() -> None:
    offload = {"elastic_checkpoint": True, "offload_optimizer": {"device": "cpu"}}
    with RankPool(2) as pool:
        messages = pool.run(first_step_error, 1, {"zero_optimization": offload}, False)
    assert all("elastic_checkpoint supports only" in message for message in messages)


def located_in_another_order() -> str:
    """A layout as ZeRO-1 makes it, but for the order of the parameters, which is the rank's own."""
    buffer, at = torch.zeros(40), 0
    parameters = {"a": nn.Parameter(torch.zeros(4, 6)), "b": nn.Parameter(torch.zeros(5, 3))}
    for name in sorted(parameters, reverse=distributed.global_rank() == 1):
        parameter: Any = parameters[name]
        parameter.data = buffer[at : at + parameter.numel()].view(parameter.shape)
        parameter._dp_group = dist.group.WORLD
        at += parameter.numel()
    try:
        locate([torch.zeros(20)], parameters)
    except ShardError as error:
        return str(error)
    return ""


def test_ranks_that_disagree_are_refused_by_all(two_ranks: RankPool) -> None:
    expected = "the ranks disagree on the layout of their shards: did they build the same model?"
    assert two_ranks.run(located_in_another_order) == [expected] * 2


def test_unknown_layouts_are_refused() -> None:
    parameter = nn.Parameter(torch.zeros(4, 6, dtype=torch.float16))
    with pytest.raises(ShardError, match=r"fp16 at ZeRO stage 0 .* use stage 1, or bf16"):
        locate([torch.zeros(4, 6)], {"weight": parameter})
    with pytest.raises(ShardError, match=r"'weight': .* shape \(24,\) .* in an unknown layout"):
        locate([torch.zeros(24)], {"weight": parameter})
    clone = torch.ones(4, 6)
    with pytest.raises(ShardError, match="found other values"):
        locate([clone], {"weight": nn.Parameter(torch.zeros(4, 6))})


class Transformer(nn.Module):
    """Two causal layers on 32 tokens, without biases: the keys' has no true gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embedding = nn.Embedding(32, 48)
        names = ["query", "key", "value", "out", "up", "down", "norm1", "norm2"]
        layers = [dict(zip(names, layer(), strict=True)) for _ in range(2)]
        self.layers = nn.ModuleList(map(nn.ModuleDict, layers))
        self.lm_head = nn.Linear(48, 32, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens[:, :-1])
        for block in self.layers:
            assert isinstance(block, nn.ModuleDict)
            y = block["norm1"](x)
            heads = (block[name](y).unflatten(-1, (4, 12)) for name in ("query", "key", "value"))
            q, k, v = (head.transpose(1, 2) for head in heads)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            x = x + block["out"](y)
            x = x + block["down"](F.gelu(block["up"](block["norm2"](x))))
        return F.cross_entropy(self.lm_head(x).flatten(0, 1), tokens[:, 1:].flatten())


def layer() -> list[nn.Module]:
    square = [nn.Linear(48, 48, bias=False) for _ in range(4)]
    mlp = [nn.Linear(48, 112, bias=False), nn.Linear(112, 48, bias=False)]
    return [*square, *mlp, nn.LayerNorm(48), nn.LayerNorm(48)]


def batch(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 32, (8, 17), generator=generator) // 2 * 2  # something to learn


def closed_loop(stage: int) -> tuple[float, float]:
    """30 steps of a transformer, each rank on its share of the data, against one process: the
    worst difference, and how much the loss fell."""
    model, reference = Transformer(), Transformer()
    settings: dict[str, Any] = {"lr": 2e-3, "weight_decay": 0.01}
    optimizer = Apollo(apollo_param_groups(model, rank=8, update_proj_gap=10), **settings)
    engine = engine_of(model, optimizer, stage, "fp32", {})
    plain = Apollo(apollo_param_groups(reference, rank=8, update_proj_gap=10), **settings)
    world, rank = distributed.world_size(), distributed.global_rank()
    losses = []
    for step in range(30):
        engine.backward(engine(batch(step)[rank::world]))
        engine.step()
        plain.zero_grad()
        loss = reference(batch(step))
        loss.backward()
        losses.append(loss.item())
        plain.step()
    found = masters(optimizer)
    engine.destroy()
    return worst(found, reference), losses[0] - losses[-1]


@pytest.mark.parametrize(
    ("world", "stage"), quick([(world, stage) for world in (2, 4) for stage in (1, 2, 3)], (2, 3))
)
def test_a_transformer_learns_the_same(pools: Pools, world: int, stage: int) -> None:
    for difference, fall in pools(world).run(closed_loop, stage):
        assert difference <= 5e-6
        assert fall > 0.5
