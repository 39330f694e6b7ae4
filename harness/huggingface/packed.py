"""Whether a model keeps packed documents apart, checked before step 1.

Some models of transformers see from positions that restart where a document begins; of the others
attention crosses documents without a word.
"""

import torch

from harness.callbacks import Callback
from harness.callbacks.callback import CallbackRun
from harness.errors import ConfigError

TOLERANCE = 1e-2
"""Of logits, relative to the largest."""


class CheckPacking(Callback):
    """Ends the run before step 1 if a document changes what is predicted in the next one."""

    def __init__(self, engine: str):
        self.engine = engine

    @torch.no_grad()
    def on_start(self, run: CallbackRun) -> None:
        """Collective. Raises ConfigError."""
        length = 4
        device = run.engines[self.engine].device
        tokens = torch.ones(2, 2 * length, dtype=torch.int64, device=device)
        tokens[1, :length] = 2  # another first document
        positions = torch.arange(length, device=device).repeat(2, 2)
        with run.engines.lend(self.engine) as model:
            model.eval()
            one, other = (
                model(input_ids=row[None], position_ids=positions[:1], use_cache=False).logits
                for row in tokens
            )
        difference = (one - other)[:, length:].abs().max()
        if difference > TOLERANCE * one.abs().max():
            raise ConfigError(
                f"task.args.packing: attention of {type(model).__name__} crosses packed documents: "
                "remove it, and documents are padded"
            )
