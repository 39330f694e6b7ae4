"""SOAP against a plain implementation, one matrix at a time."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.optim import Soap
from tests.optim.matrices.test_muon import parameters, step, worst

SHAPES = [(12, 12), (10, 15), (15, 10), (12, 12)]


class Plain(torch.optim.Optimizer):
    """The authors' equations, and the signs of ours."""

    def __init__(self, params: Any, **defaults: Any):
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self._step(p, group, self.state[p])

    def _step(self, p: Any, group: dict[str, Any], state: dict[str, Any]) -> None:
        grad, beta = p.grad, group["shampoo_beta"]
        sides = [grad @ grad.T, grad.T @ grad]
        wanted = [side.shape[0] <= group["max_precond_dim"] for side in sides]
        if not state:
            state |= {"step": 0, "m": torch.zeros_like(p), "v": torch.zeros_like(p)}
            state["grams"] = [(1 - beta) * side for side in sides]
            state["bases"] = [
                self._eigenvectors(g) if w else None
                for g, w in zip(state["grams"], wanted, strict=True)
            ]
            return
        state["step"] += 1
        (b1, b2), t = group["betas"], state["step"]
        rotated = self._rotated(grad, state)
        state["m"] = b1 * state["m"] + (1 - b1) * rotated
        state["v"] = b2 * state["v"] + (1 - b2) * rotated**2
        adam = state["m"] / (state["v"].sqrt() + group["eps"])
        rate = group["lr"] * (1 - b2**t) ** 0.5 / (1 - b1**t)
        p -= rate * self._back(adam, state)
        p -= group["lr"] * group["weight_decay"] * p
        state["grams"] = [
            beta * g + (1 - beta) * side for g, side in zip(state["grams"], sides, strict=True)
        ]
        if t % group["precondition_frequency"] == 0:
            mean = self._back(state["m"], state)
            for number, basis in enumerate(state["bases"]):
                if basis is None:
                    continue
                gram = state["grams"][number]
                order = (basis.T @ gram @ basis).diagonal().argsort(descending=True)
                state["v"] = state["v"].index_select(number, order)
                q, r = torch.linalg.qr(gram @ basis[:, order])
                state["bases"][number] = q * r.diagonal().sign()
            state["m"] = self._rotated(mean, state)

    @staticmethod
    def _eigenvectors(gram: Tensor) -> Tensor:
        return torch.linalg.eigh(gram.double()).eigenvectors.flip(1).float()

    @staticmethod
    def _rotated(x: Tensor, state: dict[str, Any]) -> Tensor:
        left, right = state["bases"]
        x = x if left is None else left.T @ x
        return x if right is None else x @ right

    @staticmethod
    def _back(x: Tensor, state: dict[str, Any]) -> Tensor:
        left, right = state["bases"]
        x = x if left is None else left @ x
        return x if right is None else x @ right.T


SETTINGS: dict[str, Any] = {
    "lr": 1e-2,
    "betas": (0.9, 0.95),
    "shampoo_beta": 0.8,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "precondition_frequency": 4,
}


@pytest.mark.parametrize("longest", [100, 12, 3])
def test_it_is_the_plain_one(longest: int) -> None:
    """With two bases, with one, and with none, which is AdamW without its first step. The first
    gradients of sides without full rank leave a basis to rounding: not in this comparison."""
    shapes = SHAPES if longest < 15 else [(12, 12), (9, 9)]
    ours, theirs = parameters(shapes), parameters(shapes)
    settings: dict[str, Any] = SETTINGS | {"max_precond_dim": longest}
    step([Soap(ours, **settings), Plain(theirs, **settings)], [ours, theirs], 40)
    assert worst(ours, theirs) <= 2e-6


AUTHORS = {
    100: [[0.0492317, 0.2743683, -0.7834077], [-0.7159457, 1.0715942, 1.2406112]],
    12: [[0.0492317, 0.2743683, -0.7834077], [-0.7290558, 1.082727, 1.2739663]],
    3: [[0.053167, 0.2682309, -0.7782571], [-0.7290121, 1.080972, 1.2585214]],
}
"""After 40 steps, by the longest side: the first weights of the first two matrices, by soap.py of
github.com/nikhilvyas/SOAP at a1e5535."""


@pytest.mark.parametrize("longest", AUTHORS)
def test_it_is_the_authors(longest: int) -> None:
    found = parameters(SHAPES if longest < 15 else [(12, 12), (9, 9)])
    settings: dict[str, Any] = SETTINGS | {"max_precond_dim": longest}
    step([Soap(found, **settings)], [found], 40)
    for weights, expected in zip(found, AUTHORS[longest], strict=False):
        assert weights.flatten()[:3].tolist() == pytest.approx(expected, abs=4e-6)


def test_it_learns_what_needs_a_rotation() -> None:
    """A quadratic whose curvature is far from any axis: nearer to its minimum than AdamW."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(20, 20)).Q for _ in range(2))
    scales = torch.logspace(0, -2, 20)
    found = {}
    for name in ("soap", "adamw"):
        x = nn.Parameter(torch.randn(20, 20, generator=torch.Generator().manual_seed(1)))
        kind: Any = Soap if name == "soap" else torch.optim.AdamW
        optimizer = kind([x], lr=3e-2, weight_decay=0.0)
        loss = torch.empty(())
        for _ in range(300):
            loss = ((left @ x @ right) * scales[:, None] * scales).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found[name] = loss.item()
    assert found["soap"] < 0.1 * found["adamw"]


@pytest.mark.parametrize("on_device", [False, True])
def test_a_gradient_that_is_not_finite_changes_nothing(
    on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in the first step, nor where the bases are due."""
    if on_device:
        for module in ("groups", "optimizer", "muon"):
            monkeypatch.setattr(f"harness.optim.matrices.{module}.may_branch", lambda _: False)
    ours, theirs = parameters(), parameters()
    optimizer, reference = (Soap(p, **SETTINGS) for p in (ours, theirs))
    for number in range(10):
        if number in (0, 5):
            before = [p.detach().clone() for p in ours]
            for parameter in ours:
                parameter.grad = torch.ones_like(parameter)
            ours[1].grad[2, 1] = torch.nan  # type: ignore[index]
            optimizer.step()
            assert all(torch.equal(a, b) for a, b in zip(ours, before, strict=True))
            for state in optimizer.state.values():
                state["calls"] -= 1  # as the reference, which has the bases due at other steps
        step([optimizer, reference], [ours, theirs], 1)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {"precondition_frequency": 0},
        {"max_precond_dim": 1.5},
        {"max_precond_dim": -1},
        {"shampoo_beta": 1.0},
        {"betas": (0.9, 1.0)},
    ],
    ids=str,
)
def test_invalid_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"= .* is not valid"):
        Soap([nn.Parameter(torch.ones(4, 3))], **settings)
