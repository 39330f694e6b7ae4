"""How far a run is from the plain loop."""

from typing import NamedTuple

from torch import Tensor

from tests.zoo.plain import Trained


class Difference(NamedTuple):
    """The largest differences of a run: `loss`, of a step's loss, relative to it or, if it is
    smaller, to 1; `weights`, of a tensor's way from its start (the norm of the difference divided
    by that of the way), with the tensor's name."""

    loss: float
    weights: float
    tensor: str

    @property
    def largest(self) -> float:
        """What the tolerance bounds."""
        return max(self.loss, self.weights)

    def __str__(self) -> str:
        return f"loss {self.loss:.1e}, weights {self.weights:.1e} ({self.tensor})"


def compare(found: Trained, expected: Trained, start: dict[str, Tensor]) -> Difference:
    """The differences of what was found. Raises AssertionError if it is not the same training."""
    assert [sorted(losses) for losses in found.losses] == [sorted(e) for e in expected.losses]
    loss = max(
        abs(got[name] - value) / max(1.0, abs(value))
        for got, losses in zip(found.losses, expected.losses, strict=True)
        for name, value in losses.items()
    )
    weights = {
        path: _relative(found.tensors[path], tensor, start.get(path))
        for path, tensor in expected.tensors.items()
    }
    worst = max(weights, key=lambda path: weights[path])
    return Difference(_or_infinite(loss), _or_infinite(weights[worst]), worst)


LEAST_STEP = 1e-3
"""Ways are taken to be at least this much, per element: an element that only rounding moves has no
way that a run could follow."""


def _relative(found: Tensor, expected: Tensor, start: Tensor | None) -> float:
    """The norm of the difference, relative to the way from `start`; without one, to `expected`."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    distance = (found.double() - expected.double()).norm()
    way = expected.double() - (0 if start is None else start.double())
    least = LEAST_STEP * max(expected.numel(), 1) ** 0.5
    return float(distance / way.norm().clamp(min=least))


def _or_infinite(value: float) -> float:
    return value if value == value else float("inf")
