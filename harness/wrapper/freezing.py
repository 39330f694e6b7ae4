"""Parameters that are not trained."""

import re
from collections.abc import Sequence

from torch import nn

from harness.errors import ConfigError, did_you_mean, first_few
from harness.utils import enclosing_names


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Sets `requires_grad` to False for the parameters that match. Returns their names.

    A pattern is a regular expression for the full name of a parameter or of a module that contains
    it. A tied parameter matches by any of its names. Raises ConfigError, with the model unchanged,
    if a pattern matches nothing.
    """
    matches: dict[str, list[tuple[str, nn.Parameter]]] = {pattern: [] for pattern in patterns}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names = enclosing_names(name)
        for pattern, matched in matches.items():
            if any(re.fullmatch(pattern, name) for name in names):
                matched.append((name, parameter))
    for pattern, matched in matches.items():
        if not matched:
            names = [name for name, _ in model.named_parameters()]
            hint = did_you_mean(pattern, {each for n in names for each in enclosing_names(n)})
            raise ConfigError(
                f"frozen: {pattern!r} matches no parameter{hint}; the model has: "
                f"{first_few(names, 20)}"
            )
    frozen = dict(pair for matched in matches.values() for pair in matched)
    for parameter in frozen.values():
        parameter.requires_grad_(False)
    return list(frozen)
