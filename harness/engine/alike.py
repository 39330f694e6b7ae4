"""Whether all ranks have built the same models."""

from collections.abc import Mapping
from itertools import zip_longest

from torch import nn

from harness import distributed
from harness.errors import TaskError
from harness.zero.parameters import full_shape, is_expert

Parameters = list[tuple[str, str]]
"""Name of each parameter, in the order of the model, and what it is."""


def check_alike(models: Mapping[str, nn.Module]) -> None:
    """Raises TaskError, on all ranks, if a model has other parameters on some rank, or the same in
    another order: gradients of different ones would be added, and collectives wait or crash.
    Collective."""
    own = {name: _parameters(model) for name, model in models.items()}
    first = distributed.broadcast(own)
    with distributed.raise_on_all_ranks("models"):
        for name, parameters in own.items():
            for found, expected in zip_longest(parameters, first[name]):
                if found != expected:
                    raise TaskError(
                        f"model {name!r} differs between the ranks: where rank 0 has the parameter "
                        f"{_told(expected)}, this one has {_told(found)}: build the same model on "
                        "every rank, with its parameters in the same order"
                    )


def _parameters(model: nn.Module) -> Parameters:
    return [
        (name, f"{list(full_shape(p))}, {p.dtype}, {'trained' if p.requires_grad else 'frozen'}")
        for name, p in model.named_parameters()
        if not is_expert(p)
    ]


def _told(parameter: tuple[str, str] | None) -> str:
    return "no more" if parameter is None else f"{parameter[0]!r} ({parameter[1]})"
