"""Ranks that build different models are refused before the first collective of DeepSpeed's."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from harness import distributed
from harness.errors import TaskError
from harness.task import default_feeder
from harness.testing.pool import RankPool
from tests.support.small_loop import engines_of


def usual() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(2, 2))


def wider() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(3, 2))


def other_order() -> nn.Module:
    first, *others = usual().named_children()
    return nn.Sequential(OrderedDict([*others, first]))


DIFFERENT: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "shape": (wider, "'1.weight' ([2, 4], torch.float32, trained)", "'1.weight' ([3, 4], "),
    "order": (other_order, "'0.weight' ([4, 4], ", "'1.weight' ([2, 4], "),
    "more": (lambda: nn.Sequential(*usual(), nn.Linear(2, 2)), "no more", "'3.weight' ([2, 2], "),
    "fewer": (lambda: nn.Sequential(*list(usual())[:2]), "'2.weight' ([2, 2], ", "no more"),
    "frozen": (
        lambda: usual().requires_grad_(False),
        "'0.weight' ([4, 4], torch.float32, trained)",
        "'0.weight' ([4, 4], torch.float32, frozen)",
    ),
    "dtype": (
        lambda: usual().to(torch.bfloat16),
        "'0.weight' ([4, 4], torch.float32, ",
        "'0.weight' ([4, 4], torch.bfloat16, ",
    ),
}


def error_of(kind: str, stage: int) -> Any:
    other = DIFFERENT[kind][0]
    try:
        engines_of({"net": other if distributed.global_rank() else usual}, default_feeder, stage)
    except TaskError as error:
        return str(error), error.rank
    return None


@pytest.mark.parametrize("kind", DIFFERENT)
def test_it_is_named_on_all_ranks(two_ranks: RankPool, kind: str) -> None:
    _, expected, found = DIFFERENT[kind]
    (text, rank), other = two_ranks.run(error_of, kind, 2)
    assert other == (text, rank) and rank == 1
    assert text.startswith("rank 1: model 'net' differs between the ranks: where rank 0 has ")
    assert f"where rank 0 has the parameter {expected}" in text and f"this one has {found}" in text
