"""Which saves of a run its rollbacks have dropped: what is written down next to them."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from harness.errors import CheckpointError

FILE = "dropped.json"
"""Next to the checkpoints of a run."""


class Span(NamedTuple):
    """The saves of a run after one time, up to when they were dropped. Times are those of
    `Manifest.saved_at`."""

    after: float
    until: float


class Kept(NamedTuple):
    """A save that is one like others again, whatever was dropped up to a time."""

    saved_at: float
    until: float


@dataclass(frozen=True)
class Dropped:
    """All that the rollbacks of a run have dropped."""

    spans: frozenset[Span] = frozenset()
    left: frozenset[Span] = frozenset()
    """What the user had left before, by `run.resume`: dropped as well, but it stays where it is."""
    kept: frozenset[Kept] = frozenset()

    def __or__(self, other: "Dropped") -> "Dropped":
        return Dropped(self.spans | other.spans, self.left | other.left, self.kept | other.kept)

    def __bool__(self) -> bool:
        return bool(self.spans or self.left)

    @staticmethod
    def read(parent: Path) -> "Dropped":
        """What is written down next to the checkpoints, on this host. Raises CheckpointError if it
        is damaged, OSError if it cannot be read."""
        try:
            return _from_json(json.loads((parent / FILE).read_bytes()))
        except FileNotFoundError:
            return Dropped()
        except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
            raise CheckpointError(
                f"{parent / FILE} is damaged: {error}: remove it, and name the checkpoint that is "
                "wanted by its path, if a rollback was killed"
            ) from None

    @property
    def until(self) -> float:
        """The newest time up to which saves are dropped; 0 if none are."""
        return max((span.until for span in self.spans | self.left), default=0.0)

    def has(self, saved_at: float | None) -> bool:
        """Whether the save of a time is dropped: "latest" does not mean it, and no rollback returns
        to it. Of one whose time is not known (None) that is not known either: no."""
        return saved_at is not None and bool(self._times(self.spans | self.left, saved_at))

    def removes(self, saved_at: float, pinned: str | None) -> bool:
        """Whether the save of a time is dropped and goes. Pinned ones stay, and what the user had
        left when a rollback dropped it."""
        dropped, left = self._times(self.spans, saved_at), self._times(self.left, saved_at)
        is_first = bool(dropped) and min(dropped) <= min(left, default=math.inf)
        return pinned is None and is_first

    def _times(self, spans: Iterable[Span], saved_at: float) -> list[float]:
        """When a save was dropped, since it was last kept: a span is up to then."""
        kept = max((each.until for each in self.kept if each.saved_at == saved_at), default=0.0)
        return [span.until for span in spans if span.after < saved_at <= span.until > kept]


def _from_json(found: Any) -> Dropped:
    if isinstance(found, list):  # of before there was more than spans
        found = {"spans": found, "left": [], "kept": []}
    spans, left, kept = (
        {(float(one), float(other)) for one, other in found[key]}
        for key in ("spans", "left", "kept")
    )
    return Dropped(
        frozenset(Span(*each) for each in spans),
        frozenset(Span(*each) for each in left),
        frozenset(Kept(*each) for each in kept),
    )
