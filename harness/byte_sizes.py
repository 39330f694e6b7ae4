"""Sizes in bytes, as one types them."""

import argparse
import re


def size(text: str) -> int:
    """Parses a size like 500MB or 5GiB into bytes; units are powers of 1000, with an i of 1024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size like 5GB")
    unit = 1024 if match[3] else 1000
    return int(float(match[1]) * unit ** " KMGT".index(match[2].upper() or " "))
