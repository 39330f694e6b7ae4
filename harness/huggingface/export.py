"""Folders that `from_pretrained` loads."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from harness.huggingface.library import transformers


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
        bars = transformers().utils.logging
        has_bars = bars.is_progress_bar_enabled()
        bars.disable_progress_bar()  # the run has its own
        try:
            model.save_pretrained(
                str(directory), state_dict=dict(state), max_shard_size=self.shard_size
            )
        finally:
            if has_bars:
                bars.enable_progress_bar()
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(str(directory))
        mode = (directory / "config.json").stat().st_mode
        for file in directory.glob("*.safetensors"):  # the library lets only their owner read them
            file.chmod(mode)
