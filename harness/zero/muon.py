"""DeepSpeed's Muon, whose ZeRO wrappers recognize matrices by an attribute of the parameters.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; AdamW for the rest.
Upstream: deepspeed/runtime/zero/muon/muon_optimizer.py.
"""

import importlib
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

PATH = "deepspeed.runtime.zero.muon.muon_optimizer:MuonWithAuxAdam"
"""Import path of the optimizer's class."""


def build_muon(
    matrices: Sequence[nn.Parameter],
    others: Sequence[nn.Parameter],
    *,
    weight_decay: float,
    muon: dict[str, Any],
    adam: dict[str, Any],
) -> Optimizer:
    """Muon with the settings `muon` for matrices, and Adam with `adam` for the others."""
    module, _, name = PATH.partition(":")
    kind = getattr(importlib.import_module(module), name)
    groups = []
    for parameters, is_muon, settings in ((matrices, True, muon), (others, False, adam)):
        for parameter in parameters:
            mark: Any = parameter
            mark.use_muon = is_muon
        if parameters:
            group = {"params": list(parameters), "use_muon": is_muon, "weight_decay": weight_decay}
            groups.append(group | settings)
    return kind(groups)
