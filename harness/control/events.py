"""Commands scheduled for a step, or for every N steps."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from harness.config.sections import EventConfig

log = logging.getLogger(__name__)

Schedule = tuple[str, int | None, int | None]
"""A command, `at`, `every`."""


@dataclass
class Event:
    """A command, due after step `at`, or after every multiple of `every` steps."""

    id: int
    command: str
    at: int | None = None
    every: int | None = None
    last_step: int = 0
    """The step at which it was last executed, or added; the key "obeyed" in checkpoints."""
    is_configured: bool = False
    """Whether it is from the config."""

    @property
    def schedule(self) -> Schedule:
        """What it executes, and when."""
        return self.command, self.at, self.every

    def is_due(self, step: int) -> bool:
        """Whether it is due after this step and has not been executed at it."""
        if self.every is not None:
            return step % self.every == 0 and step > self.last_step
        return self.at is not None and step >= self.at

    def __str__(self) -> str:
        when = f"@{self.at}" if self.every is None else f" every {self.every}"
        return f"event {self.id}: {self.command}{when}{' (config)' * self.is_configured}"


class Events:
    """The pending events, by number; part of every checkpoint.

    An event is removed, or marked, just before it is executed. So a checkpoint that is saved by an
    event contains the remaining events of that step, and a resumed run executes those first.
    """

    def __init__(self, configured: Sequence[EventConfig] = ()) -> None:
        self._events: dict[int, Event] = {}
        self._last_id = 0
        self._configured: list[Schedule] = [
            (each.command, each.at or None, each.every or None) for each in configured
        ]
        self._add_configured(0, ())

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

    def _add_configured(self, step: int, known: Sequence[Schedule]) -> None:
        """Adds the events of the config, those that are not `known`, after `step`."""
        for command, at, every in self._configured:
            if (command, at, every) in known:
                continue
            if at is not None and at <= step:
                log.info("event %s@%d of the config: the run is already at %d", command, at, step)
                continue
            self.add(command, step, at=at, every=every).is_configured = True

    def beyond(self, last_step: int) -> list[Event]:
        """Those that a run of so many steps does not reach."""
        return [event for event in self if (event.at or event.every or 0) > last_step]

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
            if not event["is_configured"]:
                del event["is_configured"]
        state: dict[str, Any] = {"last_id": self._last_id, "events": events}
        if self._configured:
            state["configured"] = [list(schedule) for schedule in self._configured]
        return state

    def load_state_dict(self, state: dict[str, Any], step: int = 0) -> None:
        """Restores what `state_dict` returned, at that step. Of the config's, new ones are added,
        and those that it has no longer are dropped."""
        self._last_id = state["last_id"]
        self._events = {}
        for item in state["events"]:
            fields = dict(item)
            last_step = fields.pop("obeyed")
            event = Event(**fields, last_step=last_step)
            if event.is_configured and event.schedule not in self._configured:
                log.info("dropping %s: the config has changed", event)
                continue
            self._events[event.id] = event
        self._add_configured(step, [tuple(each) for each in state.get("configured", [])])
