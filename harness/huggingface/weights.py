"""The weights of a folder, under the names of a model: what a run starts from, streamed.

transformers renames weights while it loads them (`LayerNorm.gamma`, a base model's prefix, ...).
Here its own rules are applied to the names alone; the tensors are read later, on each rank only its
part (checkpoint/init_weights.py), so that no rank holds a model that ZeRO 3 has sharded.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.checkpoint.init_weights import Weights, read_weights
from harness.errors import ConfigError, first_few
from harness.formats.stored_tensor import StoredTensor
from harness.huggingface.models import Description
from harness.io.stored import GrownTensor, read_tensor
from harness.zero.parameters import full_shape

log = logging.getLogger(__name__)

MEAN_AT_ONCE = 1 << 24
"""Elements that are read at once for a mean."""


@dataclass(frozen=True)
class FolderWeights:
    """`Task.init_weights` of a model from a folder.

    Weights that the folder does not have keep what the model was built with, and are logged, as
    from_pretrained does; so are those that the model does not use.
    """

    engine: str
    """Its name: it chooses among several engines' weights, as in a directory of exports."""
    description: Description

    def __call__(
        self, model: Any, entries: Mapping[str, Tensor], init_from: Path | None
    ) -> Weights | None:
        """The weights of `init_from`, or else of the model's folder; None if it has none.

        Raises ConfigError for weights of other shapes, or in a form that transformers converts.
        """
        path = init_from or self.description.folder
        if path is None:
            log.info("the model begins with new weights: %s has none", model.config.name_or_path)
            return None
        stored = read_weights(path, self.engine)
        renamed = renamed_weights(model, stored, entries, path)
        return self._matched(entries, renamed, path)

    def _matched(
        self, entries: Mapping[str, Tensor], stored: Mapping[str, StoredTensor], path: Path
    ) -> Weights:
        weights: Weights = {}
        missing, wrong = [], []
        for names in _tied(entries):
            found = next((stored[name] for name in names if name in stored), None)
            if found is None:
                missing.append(names[0])
                continue
            expected = tuple(full_shape(entries[names[0]]))
            if (fitting := self._fitting(found, expected)) is None:
                wrong.append(f"{names[0]} {list(found.shape)}, expected {list(expected)}")
            else:
                weights |= dict.fromkeys(names, fitting)
        if wrong:
            raise ConfigError(f"{path}: weights of other shapes: {first_few(wrong)}")
        if not weights:
            raise ConfigError(f"{path}: none of its weights is one of the model's")
        if unused := sorted(stored.keys() - entries.keys()):
            log.info("%s: %d weights are not used: %s", path, len(unused), first_few(unused))
        if missing:
            text = first_few(missing)
            log.warning("%s: %d weights are missing, and new: %s", path, len(missing), text)
        return weights

    def _fitting(
        self, stored: StoredTensor, shape: tuple[int, ...]
    ) -> StoredTensor | GrownTensor | None:
        """The tensor, with rows for the tokens that are new in the vocabulary; None if it has
        another shape."""
        if stored.shape == shape:
            return stored
        rows = (self.description.config.get_text_config().vocab_size,)
        is_words = stored.shape[:1] == (self.description.folder_vocabulary,)
        if is_words and shape == rows + stored.shape[1:] and len(shape) in (1, 2):
            return GrownTensor(stored, rows[0], mean_row(stored))
        return None


def renamed_weights(
    model: Any, stored: Mapping[str, StoredTensor], entries: Mapping[str, Tensor], path: Path
) -> dict[str, StoredTensor]:
    """Stored weights under the model's names, by transformers' rules. Raises ConfigError if it
    would not only rename some, but convert them, like many experts into one tensor."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    rules: Any = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if not isinstance(rule, WeightRenaming)]
    renamed: dict[str, Any] = {}
    for name, tensor in stored.items():
        if name in entries:
            renamed[name] = tensor
            continue
        new, converted_by = rename_source_key(
            name, renamings, converters, model.base_model_prefix, dict(entries)
        )
        if converted_by is not None:
            raise ConfigError(
                f"{path}: transformers converts {name!r} while it loads a {type(model).__name__}, "
                "so that it cannot be streamed. Write the folder anew: "
                f"{type(model).__name__}.from_pretrained({str(path)!r})"
                ".save_pretrained(NEW, save_original_format=False)"
            )
        renamed[new] = tensor
    return renamed


def _tied(entries: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of each tensor."""
    names: dict[int, list[str]] = {}
    for name, tensor in entries.items():
        names.setdefault(id(tensor), []).append(name)
    return [*names.values()]


def mean_row(stored: StoredTensor) -> Tensor:
    """The mean of a stored tensor's rows, float32, with which a new token starts (Hewitt,
    "Initializing New Word Embeddings for Pretrained Language Models", 2021)."""
    rows, width = stored.shape[0], stored.numel() // stored.shape[0]
    step = max(MEAN_AT_ONCE // width, 1)
    total = torch.zeros(width, dtype=torch.float64)
    for first in range(0, rows, step):
        part = read_tensor(stored, first * width, min(first + step, rows) * width)
        total += part.view(-1, width).double().sum(0)
    return (total / rows).float()
