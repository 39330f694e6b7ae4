"""Disables the fast path of torch's transformer encoder, which bypasses replaced modules."""

from typing import Any

from torch import nn


def disable_encoder_fast_path(model: nn.Module) -> None:
    """Makes torch's transformer encoder call its submodules if any of them is not torch's own.

    In eval mode `nn.TransformerEncoderLayer` takes a fast path that uses the weights of its
    submodules without calling them. A layer with a submodule that is not torch's own gets a no-op
    hook, because torch takes the normal path for layers with hooks. `replace` calls this; call it
    yourself after `inject`.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and _has_foreign_submodule(module):
            module.use_nested_tensor = False  # only the fast path can read nested tensors
        is_layer = isinstance(module, nn.TransformerEncoderLayer)
        if is_layer and _has_foreign_submodule(module) and not module._forward_pre_hooks:
            module.register_forward_pre_hook(_do_nothing)


def _has_foreign_submodule(encoder: nn.Module) -> bool:
    submodules = [module for child in encoder.children() for module in child.modules()]
    return any(not type(module).__module__.startswith("torch.nn.") for module in submodules)


def _do_nothing(*_: Any) -> None:
    pass
