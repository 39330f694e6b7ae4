"""Against the authors' own `apollo_torch`, unsharded, with our projections put into it.

It is no dependency: `pip install --no-deps apollo-torch` brings it in for these tests. It is
CC-BY-NC: nothing of it was read to write ours.
"""

import importlib
import importlib.util
import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

from harness.optim.apollo.optimizer import Apollo, ApolloMini
from harness.optim.apollo.philox import gaussian, key_of

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("apollo_torch") is None,
    reason="pip install --no-deps apollo-torch",
)

CPU = torch.device("cpu")
SHAPES = [(40, 24), (24, 48), (32, 32), (7, 65)]
STEPS, GAP = 40, 15


@pytest.fixture
def official(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Its two modules that matter; its package would import transformers and bitsandbytes."""
    spec = importlib.util.find_spec("apollo_torch")
    assert spec is not None
    package = types.ModuleType("apollo_torch")
    package.__path__ = spec.submodule_search_locations  # type: ignore[assignment]
    versions = types.ModuleType("transformers.utils.versions")
    versions.require_version = lambda *_: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apollo_torch", package)
    monkeypatch.setitem(sys.modules, "transformers.utils.versions", versions)
    for name in ("transformers", "transformers.utils"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    return types.SimpleNamespace(
        optimizer=importlib.import_module("apollo_torch.apollo").AdamW,
        projector=importlib.import_module("apollo_torch.random_projector").GradientProjector,
    )


def ours_into(official: Any, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes its projectors return the P of ours: (r, b) for tall matrices, (a, r) for wide ones."""
    refreshes = dict.fromkeys(SHAPES, 0)

    def projection(self: Any, weights: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        shape = tuple(weights.shape)
        name, inner = f"0.{SHAPES.index(shape)}", min(shape)  # type: ignore[arg-type]
        refresh = [refreshes[shape]]  # type: ignore[index]
        made = gaussian(range(inner), range(rank), refresh, [key_of(0, name)], CPU)[0]
        refreshes[shape] += 1  # type: ignore[index]
        made /= rank**0.5
        return made.T if shape[0] >= shape[1] else made

    monkeypatch.setattr(official.projector, "get_orthogonal_matrix", projection)


@pytest.mark.parametrize("scale_front", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("rank", "scale", "scale_type"),
    [(8, 1.0, "channel"), (8, 32.0, "channel"), (1, 128.0, "tensor")],
)
def test_40_steps_are_the_same(
    official: Any,
    monkeypatch: pytest.MonkeyPatch,
    rank: int,
    scale: float,
    scale_type: Any,
    weight_decay: float,
    scale_front: bool,
) -> None:
    ours_into(official, rank, monkeypatch)
    torch.manual_seed(0)
    mine = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    theirs = [nn.Parameter(p.detach().clone()) for p in mine]
    kind = Apollo if scale_type == "channel" else ApolloMini
    ours = kind(
        mine,
        lr=1e-2,
        rank=rank,
        scale=scale,
        scale_front=scale_front,
        update_proj_gap=GAP,
        weight_decay=weight_decay,
    )
    group = {
        "params": theirs,
        "rank": rank,
        "proj": "random",
        "scale_type": scale_type,
        "scale": scale,
        "update_proj_gap": GAP,
        "proj_type": "std",
    }
    reference = official.optimizer(
        [group], lr=1e-2, weight_decay=weight_decay, scale_front=scale_front
    )
    for step in range(STEPS):
        # so that the limiter has something to limit
        take_step(ours, reference, mine, theirs, 1 + 4 * (step % 7 == 0))
    assert_same(mine, theirs)


def test_svd_is_the_same_until_signs_matter(official: Any) -> None:
    """The signs of singular vectors are anybody's choice, which M remembers beyond a refresh."""
    torch.manual_seed(0)
    mine = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    theirs = [nn.Parameter(p.detach().clone()) for p in mine]
    ours = Apollo(mine, lr=1e-2, rank=6, update_proj_gap=GAP, projection="svd")
    settings = {"proj": "svd", "proj_type": "std", "update_proj_gap": GAP}
    channels = {"rank": 6, "scale": 1, "scale_type": "channel"}
    reference = official.optimizer([{"params": theirs} | settings | channels], lr=1e-2)
    for _ in range(GAP):
        take_step(ours, reference, mine, theirs)
    assert_same(mine, theirs)


def take_step(ours: Any, reference: Any, mine: list[Any], theirs: list[Any], size: int = 1) -> None:
    for one, other in zip(mine, theirs, strict=True):
        one.grad = torch.randn(one.shape) * size
        other.grad = one.grad.clone()
    ours.step()
    reference.step()


def assert_same(mine: list[Any], theirs: list[Any]) -> None:
    for one, other in zip(mine, theirs, strict=True):
        worst = (one - other).abs().max() / other.abs().max()
        assert worst <= 1e-6, (tuple(one.shape), worst)
