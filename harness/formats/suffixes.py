"""Suffixes of tensor files."""

PT = frozenset({".pt", ".pth", ".bin", ".ckpt"})
SAFETENSORS = frozenset({".sft", ".safetensors"})
KNOWN = PT | SAFETENSORS


def listed() -> str:
    """All suffixes, for error messages: ".bin, .ckpt, .pt, .pth, ..."."""
    return ", ".join(sorted(KNOWN))
