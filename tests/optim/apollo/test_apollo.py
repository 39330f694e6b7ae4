"""APOLLO in one process: the algebra, its settings, and what made other implementations NaN."""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.optim import Apollo, ApolloMini, apollo_param_groups
from harness.optim.apollo import spectral
from harness.optim.apollo.philox import gaussian, key_of
from tests.support.imports import loaded_by

CPU = torch.device("cpu")
KINDS = pytest.mark.parametrize("kind", [Apollo, ApolloMini])


def matrix(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(shape, generator=generator).to(dtype))


def drive(optimizer: torch.optim.Optimizer, gradients: Sequence[Tensor]) -> list[Tensor]:
    """Steps one parameter with these gradients; where it was after each step."""
    parameter = optimizer.param_groups[0]["params"][0]
    places = []
    for gradient in gradients:
        parameter.grad = gradient
        optimizer.step()
        places.append(parameter.detach().clone())
    return places


def random_gradients(shape: tuple[int, ...], count: int, size: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator) * size for _ in range(count)]


def naive(
    weight: Tensor,
    gradients: Sequence[Tensor],
    dtype: torch.dtype = torch.float32,
    limiter: bool = True,
) -> list[Tensor]:
    """The equations as they are usually written, without any of the precautions: rank 1 per
    channel, lr 1e-2, for a matrix with more rows than columns."""
    weight = weight.detach().clone().to(dtype)
    keys = [key_of(0, "0.0")]
    projection = gaussian(range(weight.shape[1]), range(1), [0], keys, CPU)[0].to(dtype)
    moment = square = torch.zeros(len(weight), 1, dtype=dtype)
    last: Tensor | None = None
    places = []
    for step, gradient in enumerate(gradients, 1):
        gradient = gradient.to(dtype)
        sketch = gradient @ projection
        moment = 0.9 * moment + 0.1 * sketch
        square = 0.999 * square + 0.001 * sketch**2
        adapted = moment / (square.sqrt() + 1e-6)
        update = (
            gradient * adapted.norm(dim=1, keepdim=True) / (sketch.norm(dim=1, keepdim=True) + 1e-8)
        )
        if limiter:
            norm = update.norm()
            if last is not None:
                update = update / (torch.clamp(norm / (last + 1e-8), min=1.01) / 1.01)
            last = update.norm()
        rate = 1e-2 * math.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        weight = weight - rate * update
        places.append(weight)
    return places


def test_the_equations() -> None:
    weight, gradients = matrix(12, 5), random_gradients((12, 5), 10)
    optimizer = Apollo([copy.deepcopy(weight)], lr=1e-2, rank=1)
    for ours, plain in zip(drive(optimizer, gradients), naive(weight, gradients), strict=True):
        assert torch.allclose(ours, plain, rtol=0, atol=1e-6)


def test_rank_0_is_bit_identical_to_torchs_adamw() -> None:
    gradients = random_gradients((12, 5), 20)
    settings: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-8}
    ours = drive(Apollo([matrix(12, 5)], rank=0, **settings), gradients)
    plain = drive(torch.optim.AdamW([matrix(12, 5)], fused=True, **settings), gradients)
    assert all(torch.equal(one, other) for one, other in zip(ours, plain, strict=True))


# What made others NaN, or stand still: each of these fails on the naive form.


@KINDS
@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
def test_a_non_finite_gradient_changes_nothing(kind: Any, poison: float) -> None:
    gradients = random_gradients((12, 5), 10)
    poisoned = gradients[3].clone()
    poisoned[7, 2] = poison
    spoiled = [*gradients[:3], poisoned, *gradients[3:]]
    groups = [{"rank": 2}, {"rank": 2, "projection": "svd", "update_proj_gap": 100}, {"rank": 0}]
    for group in groups:
        clean = drive(kind([group | {"params": [matrix(12, 5)]}], lr=1e-2), gradients)
        places = drive(kind([group | {"params": [matrix(12, 5)]}], lr=1e-2), spoiled)
        assert torch.equal(places[3], places[2])
        assert torch.equal(places[-1], clean[-1])
    assert naive(matrix(12, 5), spoiled)[-1].isnan().any()


def test_step_metrics_count_what_was_skipped_and_limited() -> None:
    optimizer = Apollo([matrix(12, 5)], rank=2, gamma=1.0)
    assert optimizer.step_metrics() == {}
    limited = 0.0
    for gradient in random_gradients((12, 5), 10):
        drive(optimizer, [gradient])
        metrics = optimizer.step_metrics()
        assert 0.1 < metrics["apollo/scale"] < 10 and metrics["apollo/skipped"] == 0
        limited += float(metrics["apollo/limited"])
    assert 0 < limited < 10
    drive(optimizer, [torch.full((12, 5), math.inf)])
    assert optimizer.step_metrics()["apollo/skipped"] == 1


def test_step_metrics_by_group() -> None:
    groups = [
        {"params": [matrix(12, 5)], "rank": 0},
        {"params": [matrix(12, 5)], "rank": 2},
        {"params": [matrix(9, 6)], "rank": 3},
    ]
    optimizer = Apollo(groups, lr=1e-2)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn(parameter.shape)
    optimizer.step()
    metrics = {key: float(value) for key, value in optimizer.step_metrics().items()}
    assert {key for key in metrics if "scale" in key} == {
        f"apollo/scale{n}" for n in ("", "/1", "/2")
    }
    assert metrics["apollo/scale"] == pytest.approx(
        (metrics["apollo/scale/1"] + metrics["apollo/scale/2"]) / 2
    )


def test_one_non_finite_gradient_skips_all_parameters() -> None:
    good, bad = matrix(12, 5), matrix(5, 12)
    optimizer = Apollo([good, bad], rank=2)
    good.grad, bad.grad = torch.ones(12, 5), torch.full((5, 12), math.inf)
    before = good.detach().clone()
    optimizer.step()
    assert torch.equal(good, before)


@KINDS
def test_a_first_gradient_of_zero_does_not_stop_the_limiter(kind: Any) -> None:
    gradients = [torch.zeros(12, 5), *random_gradients((12, 5), 30)]
    places = drive(kind([matrix(12, 5)], lr=1e-2, rank=1, scale=1.0), gradients)
    assert (places[-1] - places[0]).norm() > 0.01
    stuck = naive(matrix(12, 5), gradients)
    assert (stuck[-1] - stuck[0]).norm() < 1e-4


@KINDS
def test_a_gradient_of_zero_in_between_does_not_stop_the_limiter(kind: Any) -> None:
    gradients = random_gradients((12, 5), 30)
    gradients[10] = torch.zeros(12, 5)
    places = drive(kind([matrix(12, 5)], lr=1e-2, rank=1, scale=1.0), gradients)
    assert (places[-1] - places[10]).norm() > 0.01
    stuck = naive(matrix(12, 5), gradients)
    assert (stuck[-1] - stuck[10]).norm() < 1e-4


def test_a_channel_of_zeros_in_16_bits() -> None:
    gradients = random_gradients((12, 5), 4)
    for gradient in gradients:
        gradient[3] = 0
    halves = [gradient.half() for gradient in gradients]
    optimizer = Apollo([matrix(12, 5, dtype=torch.float16)], lr=1e-2, rank=1)
    places = drive(optimizer, halves)
    assert all(place.isfinite().all() and place.dtype == torch.float16 for place in places)
    assert naive(matrix(12, 5), halves, torch.float16)[0].isnan().any()


def test_the_tiniest_gradients_of_fp16() -> None:
    """Their squares, which fp16 flushes to 0, still decide the size of the step."""
    tiny = [torch.full((12, 5), 6e-8).half() for _ in range(3)]
    optimizer = Apollo([matrix(12, 5)], lr=1e-2, rank=1, eps=1e-12, gamma=None)
    parameter = optimizer.param_groups[0]["params"][0]
    before = parameter.detach().clone()
    for gradient in tiny:
        parameter.grad = gradient.float()
        optimizer.step()
    steps = (parameter - before).abs()
    assert steps.gt(1e-3).all() and steps.lt(1).all()
    stuck = naive(matrix(12, 5, dtype=torch.float16), tiny, torch.float16, limiter=False)
    assert stuck[-1].isnan().any() or torch.equal(stuck[-1], matrix(12, 5).half())


def test_the_second_moment_decays_beside_bf16_weights() -> None:
    """In bf16, 0.999 V rounds back to V: a large gradient would slow a channel for ever."""
    parameter = matrix(12, 5, dtype=torch.bfloat16)
    optimizer = Apollo([parameter], rank=1, lr=0.0)
    drive(optimizer, [torch.full((12, 5), 1e3).bfloat16()])
    square = optimizer.state[parameter]["exp_avg_sq"]
    first = square.clone()
    drive(optimizer, [torch.full((12, 5), 1e-3).bfloat16() for _ in range(1000)])
    assert square.dtype == torch.float32
    assert torch.allclose(square / first, torch.tensor(0.999**1000), rtol=1e-3)
    kept = torch.tensor(1e3, dtype=torch.bfloat16)
    assert kept * 0.999 == kept


@pytest.mark.parametrize("setting", [{"seed": 1}, {"projection": "rademacher"}])
def test_a_loaded_state_uses_no_cached_projection(setting: dict[str, Any]) -> None:
    """An optimizer that has stepped has kept its own P for the same matrix and refresh."""
    gradients = random_gradients((12, 5), 6)
    saved = Apollo([matrix(12, 5)], lr=1e-2, rank=2, **setting)
    places = drive(saved, gradients[:3])
    state = copy.deepcopy(saved.state_dict())
    expected = drive(saved, gradients[3:])
    parameter = matrix(12, 5)
    used = Apollo([parameter], lr=1e-2, rank=2)
    drive(used, gradients[:1])
    used.load_state_dict(state)
    parameter.data.copy_(places[-1])
    found = drive(used, gradients[3:])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@KINDS
def test_state_is_plain_and_resumes_bit_identically(kind: Any, tmp_path: Path) -> None:
    """Also without pickled classes, also beside weights in bf16."""
    for dtype in (torch.float32, torch.bfloat16):
        gradients = [g.to(dtype) for g in random_gradients((12, 5), 20)]
        groups = [
            {"params": [matrix(12, 5, dtype=dtype)], "rank": 2},
            {"params": [matrix(12, 5, dtype=dtype)], "rank": 2, "projection": "svd"},
            {"params": [matrix(12, 5, dtype=dtype)], "rank": 0},
        ]
        for group in groups:
            optimizer = kind([group], lr=1e-2, update_proj_gap=6)
            places = drive(optimizer, gradients[:10])
            torch.save(optimizer.state_dict(), tmp_path / "state.pt")
            expected = drive(optimizer, gradients[10:])
            again = kind([group | {"params": [nn.Parameter(places[-1])]}], lr=1.0)
            again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
            found = drive(again, gradients[10:])
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_convolutions_and_stacks_of_experts_are_matrices() -> None:
    """A stack is stepped as its slices would be alone, but for the name that P depends on."""
    kernel, flat = matrix(8, 3, 5, 5), matrix(8, 75)
    stack = matrix(3, 9, 4)
    slices = [nn.Parameter(part.clone()) for part in stack.detach()]
    one = Apollo(
        [
            {"params": [kernel], "param_names": ["kernel"]},
            {"params": [stack], "param_names": ["experts"], "stacked": True},
        ],
        rank=2,
    )
    names = [f"experts[{n}]" for n in range(3)]
    other = Apollo(
        [
            {"params": [flat], "param_names": ["kernel"]},
            {"params": slices, "param_names": names},
        ],
        rank=2,
    )
    for step in range(5):
        kernel.grad, stack.grad = (
            matrix(8, 3, 5, 5, seed=step).data,
            matrix(3, 9, 4, seed=step).data,
        )
        flat.grad = kernel.grad.view(8, 75)
        for part, gradient in zip(slices, stack.grad, strict=True):
            part.grad = gradient
        one.step()
        other.step()
    assert torch.equal(kernel.view(8, 75), flat)
    assert torch.equal(stack, torch.stack([part.detach() for part in slices]))


def test_parameters_without_a_gradient_wait() -> None:
    one, other = matrix(6, 4), matrix(4, 6)
    optimizer = Apollo([one, other], rank=2)
    start = other.detach().clone()
    one.grad = torch.ones(6, 4)
    optimizer.step()
    assert torch.equal(other, start)
    other.grad = torch.ones(4, 6)
    optimizer.step()
    assert not torch.equal(other, start)
    assert [int(optimizer.state[p]["step"]) for p in (one, other)] == [2, 1]
    one.grad = None
    optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in (one, other)] == [2, 2]
    assert {key.partition("/")[0] for key in optimizer.named_state()} == {"0.0", "0.1"}


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(6, 4, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="a gradient is sparse"):
        Apollo([table.weight], rank=0).step()


def test_a_column_major_parameter() -> None:
    straight, turned = matrix(6, 4), nn.Parameter(matrix(6, 4).detach().T.contiguous().T)
    assert not turned.is_contiguous()
    for parameter in (straight, turned):
        drive(Apollo([parameter], rank=2), random_gradients((6, 4), 3))
    assert torch.equal(straight, turned)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": -1}, "rank = -1"),
        ({"rank": 2.0}, "rank = 2.0"),
        ({"projection": "svt"}, "projection = 'svt'"),
        ({"scale_type": "row"}, "scale_type = 'row'"),
        ({"gamma": 0.5}, "gamma = 0.5"),
        ({"eps": 0.0}, "eps = 0.0"),
        ({"update_proj_gap": 0}, "update_proj_gap = 0"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Apollo([matrix(6, 4)], **settings)


def test_an_infinite_gamma_disables_the_limiter() -> None:
    """A TOML file can say `gamma = inf`, but not None."""
    gradients = random_gradients((12, 5), 1) + random_gradients((12, 5), 4, size=50.0)
    found, expected = (
        drive(Apollo([matrix(12, 5)], lr=1e-2, rank=2, gamma=gamma), gradients)
        for gamma in (math.inf, None)
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_vector_of_rank_above_0_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'bias' of shape \(7,\) is not a matrix"):
        Apollo([{"params": [matrix(7)], "param_names": ["bias"], "rank": 2}])


def test_state_of_another_rank_is_refused() -> None:
    optimizer = Apollo([matrix(6, 4)], rank=2)
    drive(optimizer, random_gradients((6, 4), 1))
    saved = optimizer.state_dict()
    saved["param_groups"][0]["rank"] = 3
    other = Apollo([matrix(6, 4)], rank=3)
    other.load_state_dict(saved)
    with pytest.raises(ValueError, match=r"has shape \(6, 2\), expected \(6, 3\)"):
        drive(other, random_gradients((6, 4), 1))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 32)
        self.attention = nn.Linear(32, 48)
        self.down_proj = nn.Linear(48, 32, bias=False)
        self.conv = nn.Conv2d(16, 20, 3)
        self.small = nn.Linear(32, 8, bias=False)
        self.norm = nn.LayerNorm(32)
        self.experts = nn.Parameter(torch.zeros(4, 24, 32))
        self.lm_head = nn.Linear(32, 100, bias=False)
        self.out = nn.Linear(32, 100, bias=False)
        self.out.weight = self.embedding.weight
        self.frozen = nn.Linear(32, 32).requires_grad_(False)


def names_of(groups: list[dict[str, Any]]) -> list[tuple[int, bool, set[str]]]:
    return [(g["rank"], g.get("stacked", False), set(g["param_names"])) for g in groups]


def test_which_parameters_are_low_rank() -> None:
    model = Model()
    groups = apollo_param_groups(model, rank=12, update_proj_gap=7)
    matrices, stacks, dense = names_of(groups)
    assert matrices == (12, False, {"attention.weight", "down_proj.weight", "conv.weight"})
    assert stacks == (12, True, {"experts"})
    assert dense[0] == 0
    assert {"embedding.weight", "lm_head.weight", "small.weight", "norm.weight"} < dense[2]
    assert not any("frozen" in name for group in (matrices, stacks, dense) for name in group[2])
    assert [group.get("update_proj_gap") for group in groups] == [7, 7, None]
    named = dict(model.named_parameters())
    assert all(
        named[n] is p for g in groups for n, p in zip(g["param_names"], g["params"], strict=True)
    )
    Apollo(groups)
    found = names_of(apollo_param_groups(model, rank=12, dense="atten", low_rank=r"small|lm_head"))
    assert found[0][2] == {"down_proj.weight", "conv.weight", "small.weight", "lm_head.weight"}


def test_no_low_rank_parameter_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="no parameter is low-rank at rank = 64"):
        apollo_param_groups(Model(), rank=64)


def test_a_closure_and_a_scheduler_work_as_with_any_optimizer() -> None:
    parameter = matrix(6, 4)
    optimizer = Apollo([parameter], lr=1.0, rank=2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    scheduler.step()
    assert optimizer.step(closure) < first
    assert scheduler.get_last_lr() == [0.5]


def test_the_state_of_another_optimizer_is_refused() -> None:
    adamw = torch.optim.AdamW([matrix(12, 5)])
    with pytest.raises(ValueError, match="not the state of an APOLLO optimizer"):
        Apollo([matrix(12, 5)], rank=2).load_state_dict(adamw.state_dict())


def test_complex_parameters_are_refused() -> None:
    weight = nn.Parameter(torch.ones(12, 5, dtype=torch.complex64))
    weight.grad = torch.ones_like(weight)
    with pytest.raises(ValueError, match="a gradient is complex"):
        Apollo([weight], rank=0).step()


def test_a_projection_that_cannot_be_computed_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = Apollo([weight := matrix(12, 5)], rank=2, projection="svd", update_proj_gap=1)
    weight.grad = random_gradients((12, 5), 1)[0]
    optimizer.step()
    before = optimizer.state[weight]["projection"].clone()

    def unable(*_: Any) -> Tensor:
        raise RuntimeError("did not converge")

    monkeypatch.setattr(spectral, "singular_vectors", unable)
    weight.grad = -weight.grad.flip(0)
    optimizer.step()
    assert torch.equal(optimizer.state[weight]["projection"], before)
    assert weight.isfinite().all()


def test_usable_alone() -> None:
    """Nothing of harness is imported but `devices`, `waiting` and the arithmetic and marks of ZeRO,
    and no DeepSpeed."""
    loaded = loaded_by(
        "import torch; from harness.optim import Apollo, Muon\n"
        "p = torch.nn.Parameter(torch.ones(4, 3)); p.grad = torch.ones(4, 3)\n"
        "Apollo([p], rank=2).step(); Muon([p]).step()\n"
    )
    rooms = ("harness.optim.apollo", "harness.optim.matrices", "harness.optim.sharded")
    own = {name for name in loaded if name.startswith(rooms)}
    zero = {f"harness.zero.{name}" for name in ("partition", "shards", "parameters")}
    others = {f"harness.{name}" for name in ("devices", "optim", "waiting", "zero")}
    assert loaded - own <= {"harness", *others} | zero
