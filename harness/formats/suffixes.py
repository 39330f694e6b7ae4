"""Suffixes of the files that tensors are stored in."""

PT = frozenset({".pt", ".pth"})
SAFETENSORS = frozenset({".sft", ".safetensors"})
KNOWN = PT | SAFETENSORS


def listed() -> str:
    """All of them, for error messages: ".pt, .pth, .safetensors, .sft"."""
    return ", ".join(sorted(KNOWN))
