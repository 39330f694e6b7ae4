"""From a user's path to an engine's files in a checkpoint, or to a file of weights.

A directory may hold several things that could be meant. Of the checkpoints of one run the newest
complete one is taken, as a resume does; between others nothing is guessed.
"""

import re
from collections.abc import Callable
from pathlib import Path

from harness.convert import foreign_directories
from harness.convert.run_checkpoints import (
    MANIFEST,
    describe_missing_engine,
    is_parent,
    newest_complete,
    open_checkpoint,
)
from harness.errors import CheckpointError, FormatError, first_few
from harness.formats import file_kinds, shard_index, tensor_file
from harness.formats.tensor_file import TensorFile
from harness.zero.reader import SavedEngine, check_complete_file, is_engine

LATEST = "latest"

OnNote = Callable[[str], object]
"""Called with a line for the user: what was taken, what was passed over."""

_NUMBERED = {"checkpoint-": re.compile(r"checkpoint-\d{1,18}")}
_ACCELERATE = re.compile(r"pytorch_model(_\d+)?")
