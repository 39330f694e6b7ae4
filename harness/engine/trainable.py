"""Refuses models that DeepSpeed cannot train, or would train in another way at another stage."""

import torch
from torch import nn

from harness.errors import ConfigError, TaskError


def check_trainable(engine: str, model: nn.Module) -> None:
    """Raises ConfigError if nothing in the model is trained, and TaskError, which names the
    parameter, for a gradient that is sparse, complex or in float64."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ConfigError(f"engines.{engine}: the model has no trainable parameter")
    for name, parameter in trained.items():
        if parameter.dtype.is_complex or parameter.dtype == torch.float64:
            remedy = (
                "keep its real and imaginary parts in a parameter of float32, and use "
                "torch.view_as_complex in forward"
                if parameter.dtype.is_complex
                else "make the model with model.float()"
            )
            raise TaskError(
                f"engine {engine!r}: parameter {name!r} is {parameter.dtype}, expected float32, "
                f"bfloat16 or float16: {remedy}, or freeze it: engines.{engine}.frozen"
            )
    for path, module in model.named_modules():
        is_sparse = isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse
        if is_sparse and module.weight.requires_grad:
            raise TaskError(
                f"engine {engine!r}: parameter {f'{path}.weight'.lstrip('.')!r} "
                f"({module.weight.dtype}) would have sparse gradients, which ZeRO cannot reduce: "
                f"make the {type(module).__name__} with sparse=False, or freeze it: "
                f"engines.{engine}.frozen"
            )
