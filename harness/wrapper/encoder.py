"""Torch's transformer encoder has a fast path for evaluation that bypasses replaced modules."""

from typing import Any

from torch import nn


def disable_encoder_fast_path(model: nn.Module) -> None:
    """Makes torch's transformer encoder call its parts wherever one of them is not torch's own.

    In evaluation `nn.TransformerEncoderLayer` takes a fast path, which computes with the weights of
    its parts and calls none of them. A layer with a part that is not torch's own gets a hook that
    does nothing: torch takes the normal path where there is a hook. `replace` does this; call it
    after `inject`.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and _has_foreign_part(module):
            module.use_nested_tensor = False  # only the fast path can read nested tensors
        is_layer = isinstance(module, nn.TransformerEncoderLayer)
        if is_layer and _has_foreign_part(module) and not module._forward_pre_hooks:
            module.register_forward_pre_hook(_do_nothing)


def _has_foreign_part(encoder: nn.Module) -> bool:
    parts = [part for child in encoder.children() for part in child.modules()]
    return any(not type(part).__module__.startswith("torch.nn.") for part in parts)


def _do_nothing(*_: Any) -> None:
    pass
