"""`Callback`: the moments of a run that code of the user's can take part in."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from harness.config import Config


class CallbackRun(Protocol):
    """What a callback sees of the run, and how it acts on it."""

    @property
    def step(self) -> int:
        """The last step taken."""
        ...

    @property
    def config(self) -> Config:
        """The config, with the changes of live commands."""
        ...

    @property
    def engines(self) -> Any:
        """The engines by name, `engine.engines.Engines`, as the task's own commands get them."""
        ...

    @property
    def is_leader(self) -> bool:
        """Whether this is rank 0."""
        ...

    def command(self, text: str) -> None:
        """Has a live command executed on all ranks, like "lr x0.5" or "save as best".

        Rank 0's count; other ranks' are ignored. At once after the callbacks of this moment; those
        of `on_step` after the step after the next, so that training does not wait to agree.
        """
        ...

    def stop(self, reason: str) -> None:
        """The command `quit`, with a reason for the log and for ended.json."""
        ...


class Callback:
    """Override any of the moments. Every rank calls them between the same two steps, in the order
    of `Task.callbacks`.

    An exception on any rank ends the run on all of them. What is drawn from the random generators
    does not count for the run. What communicates, as a forward pass does at ZeRO stage 3, must be
    done by all ranks alike, and not in `on_step`, which they do not call at the same time.
    """

    def on_start(self, run: CallbackRun) -> None:
        """Before the first step of this start, resumed or not."""

    def on_step(self, run: CallbackRun, metrics: Mapping[str, Any]) -> None:
        """Once for each step, when its `metrics` are known: while or after the next two are taken.
        They are a record of metrics.jsonl, with its `step`."""

    def on_eval(self, run: CallbackRun, metrics: Mapping[str, Any]) -> None:
        """After an evaluation: `step`, `eval/loss`, ..."""

    def on_save(self, run: CallbackRun, path: Path) -> None:
        """After a checkpoint was written; with `checkpoint.background` some steps after its own."""

    def on_export(self, run: CallbackRun, path: Path) -> None:
        """After the weights were exported into the directory `path`."""

    def on_end(self, run: CallbackRun) -> None:
        """After the last save of a run that ends in order. Commands are ignored."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on alike: tensors and plain values, the same on every
        rank. Part of each checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
