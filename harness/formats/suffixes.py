"""Suffixes of tensor files."""

PT = frozenset({".pt", ".pth"})
SAFETENSORS = frozenset({".sft", ".safetensors"})
KNOWN = PT | SAFETENSORS


def listed() -> str:
    """All suffixes, for error messages: ".pt, .pth, .safetensors, .sft"."""
    return ", ".join(sorted(KNOWN))
