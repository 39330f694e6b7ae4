"""Commands scheduled for a step, or for every N steps."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Event:
    """A command, due after step `at`, or after every multiple of `every` steps."""

    id: int
    command: str
    at: int | None = None
    every: int | None = None
    last_step: int = 0
    """The step at which it was last executed, or added; the key "obeyed" in checkpoints."""

    def is_due(self, step: int) -> bool:
        """Whether it is due after this step and has not been executed at it."""
        if self.every is not None:
            return step % self.every == 0 and step > self.last_step
        return self.at is not None and step >= self.at

    def __str__(self) -> str:
        when = f"@{self.at}" if self.every is None else f" every {self.every}"
        return f"event {self.id}: {self.command}{when}"


class Events:
    """The pending events, by number; part of every checkpoint.

    An event is removed, or marked, just before it is executed. So a checkpoint that is saved by an
    event contains the remaining events of that step, and a resumed run executes those first.
    """

    def __init__(self) -> None:
        self._events: dict[int, Event] = {}
        self._last_id = 0

    def __iter__(self) -> Iterator[Event]:
        return iter(list(self._events.values()))

    def add(
        self, command: str, step: int, *, at: int | None = None, every: int | None = None
    ) -> Event:
        """Adds an event at `step`, which is itself not due for `every`."""
        self._last_id += 1
        event = Event(self._last_id, command, at, every, last_step=step)
        self._events[event.id] = event
        return event

    def clear(self, id: int | None = None) -> list[Event]:
        """Removes one event (None: all), and returns the removed ones."""
        removed = [event for event in self if id in (None, event.id)]
        for event in removed:
            del self._events[event.id]
        return removed

    def due(self, step: int) -> Iterator[Event]:
        """The events due after `step`, each marked or removed as it is yielded."""
        for event in self:
            if event.id in self._events and event.is_due(step):
                event.last_step = step
                if event.every is None:
                    del self._events[event.id]
                yield event

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        events = [asdict(event) for event in self]
        for event in events:
            event["obeyed"] = event.pop("last_step")
        return {"last_id": self._last_id, "events": events}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._last_id = state["last_id"]
        self._events = {}
        for item in state["events"]:
            fields = dict(item)
            last_step = fields.pop("obeyed")
            self._events[item["id"]] = Event(**fields, last_step=last_step)
