"""fp16: the loss scale is found, limited, recorded and resumed; APOLLO trains in it.

DeepSpeed refuses fp16 on a CPU, although torch computes in it there: these tests patch its
accelerator's `is_fp16_supported`. Nothing here has run on a GPU.
"""

from collections.abc import Callable
from itertools import compress, pairwise
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from harness.config import Config
from harness.errors import ConfigError
from harness.optim import Apollo, apollo_param_groups
from harness.run import run_in_world
from harness.testing.pool import RankPool
from tests.support.helpers import Pools, assert_equal, checkpoint, exported, records, tiny_config
from tests.support.small_loop import engines_of, train, weights_of

R = TypeVar("R")
WINDOW = 2
"""Steps without an overflow after which the scale doubles."""
APOLLO = {"name": "apollo", "rank": 2, "lr": 1e-2}
ADAMW = {"name": "adamw", "lr": 1e-2}


def fp16(power: int, **settings: Any) -> dict[str, Any]:
    """DeepSpeed keys."""
    keys = {"enabled": True, "initial_scale_power": power, "loss_scale_window": WINDOW}
    return {"fp16": keys | {"hysteresis": 1} | settings, "gradient_clipping": 1.0}


def with_fp16(function: Callable[..., R], *args: Any) -> R:
    """The result of a function, on a CPU that DeepSpeed takes for one with fp16."""
    from deepspeed.accelerator import get_accelerator

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
        return function(*args)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batches() -> list[Tensor]:
    return list(torch.randn(12, 4, 6, generator=torch.Generator().manual_seed(1)))


def feed(engine: Any, batch: Tensor) -> tuple[Tensor, dict[str, Any]]:
    return engine(batch.to(engine.dtype)).float().square().mean(), {}


def trained(
    stage: int, optimizer: dict[str, Any], limit: float | None
) -> tuple[list[float], list[int], dict[str, Any]]:
    """Loss scale and skipped steps after each step, as recorded; and the weights."""
    settings = {"optimizer": optimizer, "max_loss_scale": limit}
    engines = engines_of(model(), feed, stage, fp16(24 if limit is None else 16), **settings)
    scales, skipped = [], []
    for batch in batches():
        train(engines, [batch])
        rates = engines.rates()
        scales.append(float(rates["loss_scale"]))
        skipped.append(int(rates["skipped"]))
    weights = weights_of(engines)
    engines.close()
    return scales, skipped, weights


def optimizer_of(net: nn.Module, settings: dict[str, Any]) -> torch.optim.Optimizer:
    if settings is ADAMW:
        return torch.optim.AdamW(net.parameters(), lr=settings["lr"])
    return Apollo(apollo_param_groups(net, rank=settings["rank"]), lr=settings["lr"])


def plain(optimizer: torch.optim.Optimizer, net: nn.Module, steps: list[Tensor]) -> dict[str, Any]:
    for batch in steps:
        optimizer.zero_grad()
        net(batch).square().mean().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    return net.state_dict()


def norm_of(tensors: dict[str, Tensor]) -> float:
    return float(torch.cat([tensor.flatten() for tensor in tensors.values()]).norm())


CASES = [(1, APOLLO), (3, APOLLO), (2, ADAMW)]
SLOW = [(2, APOLLO), (1, ADAMW), (3, ADAMW)]


@pytest.mark.parametrize("limit", [None, 1000.0])
@pytest.mark.parametrize(
    ("stage", "settings"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_it_trains_as_in_fp32(
    two_ranks: RankPool, stage: int, settings: dict[str, Any], limit: float | None
) -> None:
    """From a scale that overflows at first; and with a limit, up to which it grows."""
    for scales, skipped, weights in two_ranks.run(with_fp16, trained, stage, settings, limit):
        if limit is None:
            assert scales[:3] == [2.0**23, 2.0**22, 2.0**21] and skipped[:3] == [1, 2, 3]
            assert scales[-1] > min(scales)  # it grows again
        else:
            assert scales == [512.0] * 2 + [1000.0] * (len(scales) - 2)
            assert skipped == [0] * len(scales)
        net = model()
        taken = [now == before for before, now in pairwise([0, *skipped])]
        expected = plain(optimizer_of(net, settings), net, list(compress(batches(), taken)))
        start, found = model().state_dict(), {n: w.float() for n, w in weights.items()}
        moved = norm_of({name: expected[name] - start[name] for name in start})
        differs = norm_of({name: expected[name] - found[name] for name in start})
        assert differs < 0.2 * moved, (differs, moved)


def step_of_deepspeed(stage: int) -> dict[str, Tensor]:
    """The weights after a step of DeepSpeed alone."""
    import deepspeed

    net = model()
    engine: Any = deepspeed.initialize(
        model=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=1.0),
        config=fp16(10)
        | {"train_batch_size": 4, "zero_optimization": {"stage": stage}}
        | {"zero_allow_untested_optimizer": True},
    )[0]
    engine.backward(engine(batches()[0].half()).float().square().mean())
    engine.step()
    weights = {name: p.detach().float().clone() for name, p in net.named_parameters()}
    engine.destroy()
    return weights


def test_deepspeed_does_not_apply_the_scale_at_stage_0(pools: Pools) -> None:
    """But divides by it: a step of SGD hardly moves the weights. If this fails, DeepSpeed is fixed,
    and `check_zero` need not refuse it."""
    net, start = model(), model().state_dict()
    expected = plain(torch.optim.SGD(net.parameters(), lr=1.0), net, batches()[:1])
    for stage, share in ((0, 0.0), (1, 1.0)):
        (found,) = pools(1).run(with_fp16, step_of_deepspeed, stage)
        moved = norm_of({name: found[name] - start[name] for name in start})
        whole = norm_of({name: expected[name] - start[name] for name in start})
        assert moved / whole == pytest.approx(share, abs=0.02), stage


def config_of(directory: Path, steps: int, **engine: Any) -> Config:
    settings = {"ds_overrides": fp16(20), "max_loss_scale": 2.0**19} | engine
    return tiny_config(directory, 2, engines={"net": settings}, run={"steps": steps})


def test_a_run_resumes_with_its_scale(two_ranks: RankPool, tmp_path: Path) -> None:
    whole, parts = config_of(tmp_path / "whole", 9), config_of(tmp_path / "parts", 9)
    two_ranks.run(with_fp16, run_in_world, whole)
    for steps in (4, 9):
        two_ranks.run(with_fp16, run_in_world, config_of(tmp_path / "parts", steps))
    for key in ("loss", "loss_scale", "skipped"):
        assert [r[key] for r in records(parts)] == [r[key] for r in records(whole)], key
    scales = [r["loss_scale"] for r in records(whole)]
    assert len(set(scales)) > 1 and max(scales) <= 2.0**19
    assert_equal(exported(parts), exported(whole))
    assert checkpoint(whole, 9).is_dir()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "fp16.enabled: found None, expected true: max_loss_scale"),
        ({"fp16": {"enabled": True, "loss_scale": 8}}, "fp16.loss_scale: found 8, expected 0"),
    ],
)
def test_a_limit_without_a_dynamic_scale_is_refused(
    tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    engine = {"ds_overrides": keys, "max_loss_scale": 1024}
    with pytest.raises((ConfigError, ValueError), match=message):
        tiny_config(tmp_path, engines={"net": engine})
