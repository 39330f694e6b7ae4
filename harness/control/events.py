"""Commands that wait for a step: once at a step, or at every multiple of a number of steps."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Event:
    """A command, and when it is due: at the end of step `at`, or of every step `every` divides."""

    id: int
    command: str
    at: int | None = None
    every: int | None = None
    obeyed: int = 0
    """The last step that it was obeyed at."""

    def is_due(self, step: int) -> bool:
        """Whether it is to be obeyed at the end of this step, and was not yet."""
        if self.every is not None:
            return step % self.every == 0 and step > self.obeyed
        return self.at is not None and step >= self.at

    def __str__(self) -> str:
        when = f"@{self.at}" if self.every is None else f" every {self.every}"
        return f"event {self.id}: {self.command}{when}"


class Events:
    """The pending events, by number; part of every checkpoint.

    An event is taken off, or marked, just before it is obeyed: a checkpoint that an event writes
    holds the events of the same step that come after it, and a resumed run obeys those first.
    """

    def __init__(self) -> None:
        self._events: dict[int, Event] = {}
        self._last_id = 0

    def __iter__(self) -> Iterator[Event]:
        return iter(list(self._events.values()))

    def add(
        self, command: str, step: int, *, at: int | None = None, every: int | None = None
    ) -> Event:
        """Adds one at the end of `step`; that step does not count for `every`."""
        self._last_id += 1
        event = Event(self._last_id, command, at, every, obeyed=step)
        self._events[event.id] = event
        return event

    def clear(self, id: int | None = None) -> list[Event]:
        """Forgets one event (or all, if None), and says which."""
        gone = [event for event in self if id in (None, event.id)]
        for event in gone:
            del self._events[event.id]
        return gone

    def due(self, step: int) -> Iterator[Event]:
        """The events to obey at the end of `step`, each marked or taken off as it is given out."""
        for event in self:
            if event.id in self._events and event.is_due(step):
                event.obeyed = step
                if event.every is None:
                    del self._events[event.id]
                yield event

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"last_id": self._last_id, "events": [asdict(event) for event in self]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self._last_id = state["last_id"]
        self._events = {item["id"]: Event(**item) for item in state["events"]}
