"""The backend of torch's scaled_dot_product_attention."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from harness.errors import ConfigError

BACKENDS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


@contextmanager
def attention_backend(
    name: str, dtypes: Iterable[torch.dtype], device: torch.device
) -> Iterator[None]:
    """Inside the context, scaled_dot_product_attention uses only this backend; with "any", torch
    chooses.

    Raises ConfigError if the backend has no kernel for one of the dtypes on the device, or for a
    call inside the context.
    """
    if name == "any":
        yield
        return
    with sdpa_kernel(BACKENDS[name]):
        for dtype in dtypes:
            x = torch.zeros(1, 1, 8, 64, dtype=dtype, device=device)
            try:
                nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
            except RuntimeError as error:
                raise ConfigError(
                    f"attention = {name!r}: no kernel for {dtype} on {device.type}: {error}"
                ) from None
        try:
            yield
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
            raise ConfigError(
                f"attention = {name!r}: it has no kernel on {device.type} for a call in the model, "
                "because of its dropout, mask, head size or dtype: choose another backend, or "
                '"any"'
            ) from error
