"""State dicts, and whatever nests around them, saved and loaded as `.pt` and `.sft`."""

from harness.io.save_load import load, save

__all__ = ["load", "save"]
