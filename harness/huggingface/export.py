"""Folders that `from_pretrained` loads."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class FolderExport:
    """`Task.exporters` of a model of transformers: its config, its generation config, weights in
    shards with an index, and its tokenizer or processor."""

    tokenizer: Any | None = None
    """Something with `save_pretrained`."""
    shard_size: str = "5GB"
    """The size of the largest file of weights, like "200MB"."""

    def __call__(self, model: Any, state: Mapping[str, Tensor], directory: Path) -> None:
        """Writes the folder. `state`: the full weights, under the model's names. Raises OSError."""
        model.save_pretrained(
            str(directory), state_dict=dict(state), max_shard_size=self.shard_size
        )
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(str(directory))
