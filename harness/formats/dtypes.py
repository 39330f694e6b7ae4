"""The dtypes of tensors in files, under torch's names."""

from collections.abc import Sequence

from harness.errors import FormatError

SIZES = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "uint16": 2,
    "int16": 2,
    "uint32": 4,
    "int32": 4,
    "uint64": 8,
    "int64": 8,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex32": 4,
    "complex64": 8,
    "complex128": 16,
}
"""Bytes per element."""

FLOATS = ("float16", "bfloat16", "float32", "float64")
"""The dtypes between which `cast` converts."""

SAFETENSORS = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "float4_e2m1fn_x2": "F4",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
}
"""Their names in safetensors files, which support no other complex dtypes."""

PAIRS = "float4_e2m1fn_x2"
"""The dtype of which torch counts pairs, which take a byte, and safetensors the halves."""

STORAGES = {
    "bool": "BoolStorage",
    "uint8": "ByteStorage",
    "int8": "CharStorage",
    "int16": "ShortStorage",
    "int32": "IntStorage",
    "int64": "LongStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "complex64": "ComplexFloatStorage",
    "complex128": "ComplexDoubleStorage",
}
"""torch's storage classes, which `.pt` files name. Other dtypes are bytes in an UntypedStorage."""

STORAGE_DTYPES = {f"torch.{name}": dtype for dtype, name in STORAGES.items()} | {
    "torch.UntypedStorage": "uint8",
    "torch.storage.UntypedStorage": "uint8",
}
"""The dtypes of torch's storage classes, by full name."""


def to_safetensors(dtype: str, shape: Sequence[int]) -> tuple[str, tuple[int, ...]]:
    """The dtype and shape that a tensor of torch has in safetensors. Raises FormatError if none."""
    if dtype not in SAFETENSORS:
        raise FormatError(f"safetensors does not support {dtype}")
    if dtype != PAIRS:
        return SAFETENSORS[dtype], tuple(shape)
    if not shape:
        raise FormatError("cannot store a float4 tensor without dimensions")
    return SAFETENSORS[dtype], (*shape[:-1], 2 * shape[-1])


def from_safetensors(dtype: str, shape: Sequence[int]) -> tuple[str, tuple[int, ...]]:
    """The dtype and shape that a tensor of safetensors has in torch. Raises FormatError if none."""
    if dtype not in _TORCH:
        raise FormatError(f"its dtype {dtype} is one that torch does not have")
    if _TORCH[dtype] != PAIRS:
        return _TORCH[dtype], tuple(shape)
    if not shape or shape[-1] % 2:
        raise FormatError(f"torch supports {dtype} only in pairs")
    return _TORCH[dtype], (*shape[:-1], shape[-1] // 2)


_TORCH = {short: dtype for dtype, short in SAFETENSORS.items()}
