"""The entries, by theme; importing this package registers all of them in `ZOO`."""

from tests.zoo.entry import ZOO
from tests.zoo.models import (
    adversarial,
    basics,
    branches,
    huggingface,
    normalization,
    sequence,
    training,
    vision,
)

__all__ = [
    *("ZOO", "adversarial", "basics", "branches", "huggingface"),
    *("normalization", "sequence", "training", "vision"),
]
